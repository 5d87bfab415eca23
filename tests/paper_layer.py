"""The slow, obvious twin that the fast code is held to: the SparseGrad paper's layer and optimizer, term by term."""

from __future__ import annotations

import math

import torch
from torch import nn


def random_orthogonal(n: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix (n, n) in float64."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


class PaperLinear(nn.Module):
    """The layer of section 3.2: y = ((x U) W̃ᵀ) Vᵀ + b, with the rotated weight W̃ = Vᵀ W U, which trains.

    Args:
        linear: The layer that it replaces, weight (out, in).
        U: Orthogonal, (in, in).
        V: Orthogonal, (out, out).
        support: Flat positions in W̃ that train, for a static support.
        k: Number of entries that train in each step, for a dynamic one.
    """

    def __init__(self, linear: nn.Linear, U: torch.Tensor, V: torch.Tensor, support=None, k: int | None = None):
        super().__init__()
        self.U, self.V, self.support, self.k = U, V, support, k
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self.weight = nn.Parameter(V.T @ linear.weight.detach() @ U)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_tilde = x @ self.U
        y_tilde = x_tilde @ self.weight.T
        y = y_tilde @ self.V.T
        return y if self.bias is None else y + self.bias

    def original_weight(self) -> torch.Tensor:
        """The weight back in the model's own basis."""
        return self.V @ self.weight.detach() @ self.U.T

    def mask_gradient(self) -> None:
        """Keep the support's part of the gradient of W̃, or its `k` entries of largest magnitude."""
        gradient = self.weight.grad.flatten().tolist()
        kept = self.support
        if kept is None:
            kept = sorted(range(len(gradient)), key=lambda i: -abs(gradient[i]))[: self.k]
        kept = set(map(int, kept))
        masked = [g if i in kept else 0.0 for i, g in enumerate(gradient)]
        self.weight.grad = torch.tensor(masked, dtype=torch.float64).view_as(self.weight)


class PaperAdam:
    """The masked Adam of section 5.1, entry by entry: one whose gradient is zero keeps its value and its moments."""

    def __init__(self, parameters, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps, self.weight_decay, self.t = lr, betas, eps, weight_decay, 0
        self.m = [[0.0] * p.numel() for p in self.parameters]
        self.v = [[0.0] * p.numel() for p in self.parameters]

    def step(self) -> None:
        self.t += 1
        for parameter, m, v in zip(self.parameters, self.m, self.v, strict=True):
            theta, gradient = parameter.detach().flatten().tolist(), parameter.grad.flatten().tolist()
            for i, g in enumerate(gradient):
                if g != 0:
                    theta[i] = self._entry(theta[i], g, m, v, i)
            with torch.no_grad():
                parameter.copy_(torch.tensor(theta, dtype=parameter.dtype).view_as(parameter))

    def _entry(self, theta: float, g: float, m: list[float], v: list[float], i: int) -> float:
        beta1, beta2 = self.betas
        m[i] = beta1 * m[i] + (1 - beta1) * g
        v[i] = beta2 * v[i] + (1 - beta2) * g * g
        m_hat = m[i] / (1 - beta1**self.t)
        v_hat = v[i] / (1 - beta2**self.t)
        decayed = theta - self.lr * self.weight_decay * theta
        return decayed - self.lr * m_hat / (math.sqrt(v_hat) + self.eps)
