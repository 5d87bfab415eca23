"""The gradient of a weight in one backward pass, as a warm-up or a probe observes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .accumulators import Accumulator
from .hosvd import Reduce
from .sides import Side
from .stacked import stacked_core_gradient
from .weight_gradient import at_least_float32, core_gradient, gradient_energy


@dataclass(frozen=True)
class LinearGradient:
    """The gradient `G = dyᵀ x` (out, in) of a linear layer's weight, which is kept as its two factors.

    Attributes:
        x: Input of the layer, shape (tokens, in).
        dy: Gradient of its output, shape (tokens, out).
    """

    x: torch.Tensor
    dy: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Tensors that have to be finite, the one that comes from the loss last."""
        return self.x, self.dy

    def in_core(self, U: Side, V: Side) -> torch.Tensor:
        """Return `Vᵀ G U`, shape (r_out, r_in), in at least float32."""
        return core_gradient(self.x, self.dy, U, V)

    def energy(self) -> torch.Tensor:
        """Return ‖G‖²."""
        return gradient_energy(self.x, self.dy)

    def add_to(self, accumulator: Accumulator, mean_over_ranks: Reduce) -> None:
        """Add the mean of all ranks' gradients to the sums that make a basis."""
        accumulator.update(self.x, self.dy, mean_over_ranks)


@dataclass(frozen=True)
class StackedGradient:
    """The gradients G_e (out, in) of several experts' weights, all of which share a basis.

    Attributes:
        stack: Shape (experts, out, in).
    """

    stack: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Tensors that have to be finite, the one that comes from the loss last."""
        return (self.stack,)

    def in_core(self, U: Side, V: Side) -> torch.Tensor:
        """Return `Vᵀ G_e U` of every expert, shape (experts * r_out, r_in), in at least float32."""
        return stacked_core_gradient(self._in_full_precision(), U, V, len(self.stack))

    def energy(self) -> torch.Tensor:
        """Return Σ_e ‖G_e‖²."""
        return self._in_full_precision().square().sum()

    def add_to(self, accumulator: Accumulator, mean_over_ranks: Reduce) -> None:
        """Add the mean of all ranks' gradients to the sums that make a basis."""
        accumulator.add_gradient(mean_over_ranks(self._in_full_precision().clone()))

    def _in_full_precision(self) -> torch.Tensor:
        return at_least_float32(self.stack)


ObservedGradient = LinearGradient | StackedGradient
