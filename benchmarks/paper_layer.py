"""The layer of the SparseGrad paper, written out as section 3.2 states it, without regard for cost."""

from __future__ import annotations

import torch
from torch import nn


class PaperLinear(nn.Module):
    """y = ((x U) W̃ᵀ) Vᵀ + b with the rotated weight W̃ = Vᵀ W U: three dense products, of which W̃ trains.

    Autograd computes the full gradient of W̃ in each backward pass; all but its `k` largest entries are then set to
    zero. Together with `SparseGradAdam`, which leaves the entries with a zero gradient alone, this is the paper's
    training step.

    Args:
        linear: The layer to replace, weight (out, in).
        U: Orthogonal, (in, in).
        V: Orthogonal, (out, out).
        k: Entries of the gradient that are kept in each step.
    """

    U: torch.Tensor
    V: torch.Tensor

    def __init__(self, linear: nn.Linear, U: torch.Tensor, V: torch.Tensor, k: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("U", U)
        self.register_buffer("V", V)
        self.weight = nn.Parameter(V.T @ linear.weight.detach() @ U)
        self.weight.register_hook(self._keep_largest)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in); returns (..., out)."""
        y = ((x @ self.U) @ self.weight.T) @ self.V.T
        return y if self.bias is None else y + self.bias

    def _keep_largest(self, gradient: torch.Tensor) -> torch.Tensor:
        """`gradient` (out, in) with all but the `k` entries of largest magnitude set to zero."""
        flat = gradient.flatten()
        largest = flat.abs().topk(self.k).indices
        return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(gradient)


def attach_paper_layers(model: nn.Module, targets: list[tuple[str, nn.Module]], density: float) -> nn.Module:
    """Replace the linear layers `targets` in place by `PaperLinear`, and freeze everything else.

    Layers of the same shape share U and V, which are random orthogonal matrices: the cost does not depend on them.
    """
    model.requires_grad_(False)
    bases: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, linear in targets:
        assert isinstance(linear, nn.Linear)
        weight = linear.weight
        if weight.shape not in bases:
            U, V = random_orthogonal(weight.shape[1]), random_orthogonal(weight.shape[0])
            bases[weight.shape] = U.to(weight), V.to(weight)
        U, V = bases[weight.shape]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PaperLinear(linear, U, V, round(density * weight.numel())))
    return model


def random_orthogonal(n: int) -> torch.Tensor:
    """An orthogonal matrix (n, n), the same for each n."""
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n))).Q
