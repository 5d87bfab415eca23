"""Synthetic gradients with a known spectrum, in the form in which a backward pass has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .paper_layer import random_orthogonal


@dataclass
class Gradients:
    """Gradients G = dyᵀ x (out, in) of one group of layers, made anew on every call from their number.

    x and dy are Gaussian; the scale of x along the i-th of a random orthonormal basis is i^-decay, smaller by `drop`
    from the `leading`-th on, and so is that of dy.

    Attributes:
        out_features: Rows of G.
        in_features: Columns of G.
        tokens: Rows of x and dy.
        decay: Exponent of the power law; 0 with `drop=1` is a flat spectrum.
        leading: Directions before the drop.
        drop: Factor by which the rest is smaller, which separates the leading subspace.
        device: Where the gradients are.
    """

    out_features: int
    in_features: int
    tokens: int
    decay: float
    leading: int
    drop: float
    device: torch.device

    def __post_init__(self) -> None:
        self.mix_in = self._mix(self.in_features)
        self.mix_out = self._mix(self.out_features)

    def _mix(self, n: int) -> torch.Tensor:
        """The square root (n, n) of the covariance of a token's features."""
        place = torch.arange(1, n + 1, dtype=torch.float32)
        scale = place.pow(-self.decay) / torch.where(place > self.leading, self.drop, 1.0)
        return (scale[:, None] * random_orthogonal(n).T).to(self.device)

    def __call__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x (tokens, in) and dy (tokens, out) of the gradient number `index`."""
        generator = torch.Generator(self.device).manual_seed(index)
        noise = torch.randn(self.tokens, self.in_features + self.out_features, generator=generator, device=self.device)
        x, dy = noise.split([self.in_features, self.out_features], dim=1)
        return x @ self.mix_in, dy @ self.mix_out

    def stack(self, count: int) -> torch.Tensor:
        """The first `count` gradients, (count, out, in): what the paper decomposes."""
        return torch.stack([dy.T @ x for x, dy in map(self, range(count))])
