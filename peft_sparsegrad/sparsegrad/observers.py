"""Who looks at the gradient of a layer's weight in the backward pass, and how it gets there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from ..functional import (
    LinearGradient,
    ObservedGradient,
    StackedGradient,
    observe_gradient,
    observe_weight_gradient,
)

if TYPE_CHECKING:
    from .adapter import LayerAdapter

# Called in the backward pass with the adapter and the gradient of its weight; returns whether it could use it.
Observer: TypeAlias = "Callable[[LayerAdapter, ObservedGradient], bool]"


class WarmUp(Protocol):
    """An observer of the gradients from which bases and supports are chosen."""

    def __call__(self, adapter: LayerAdapter, gradient: ObservedGradient) -> bool:
        """Observe the gradient of a weight, and return whether it could be used."""
        ...

    def enter(self, adapter: LayerAdapter) -> None:
        """Note that a forward pass comes to a layer, and end what the passes so far have completed."""
        ...


@torch.compiler.disable
def observe_output(
    adapter: LayerAdapter, result: torch.Tensor, x: torch.Tensor, observer: Observer, blocks: bool
) -> torch.Tensor:
    """Return `result` unchanged, and let the observer see x and ∂L/∂y in the backward pass; see `observe_gradient`."""
    return observe_gradient(result, x, adapter.values, lambda x, dy: observer(adapter, LinearGradient(x, dy)), blocks)


@torch.compiler.disable
def observe_weight(adapter: LayerAdapter, weight: torch.Tensor, observer: Observer, blocks: bool) -> torch.Tensor:
    """Return `weight` unchanged, and let the observer see its gradient; see `observe_weight_gradient`."""

    def observe(gradient: torch.Tensor) -> bool:
        return observer(adapter, StackedGradient(gradient.view(-1, *adapter.plan.weight_shape)))

    return observe_weight_gradient(weight, adapter.values, observe, blocks)
