"""The masks of layers in a graph of `torch.compile`, which would keep the mask of the pass that it was made in.

So an operator that the graph calls, but does not contain, draws them in the backward pass. The graph names the layer
by a number in a tensor: a number or a name in its code would make a graph of its own for each block of a model.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable


class MaskingLayer(Protocol):
    """A layer that masks the gradients of its deltas."""

    def mask_arriving_(self, gradient: torch.Tensor, adapter_name: str, kind: str) -> None:
        """Mask the contiguous gradient of the delta of the `"weight"` or `"bias"` in place, as it arrives."""
        ...


_LAYERS: weakref.WeakValueDictionary[int, MaskingLayer] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
# A CUDA graph would replay the masks of the pass that it was recorded in; before torch 2.9 a CPU tensor prevents it.
_NO_CUDA_GRAPH: dict[str, Any] = (
    {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


def numbered(layer: MaskingLayer) -> torch.Tensor:
    """Return a new number for a layer, int64 (1,), by which `masked` finds it for as long as it lives."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor([number], device="cpu")


def masked(value: torch.Tensor, number: torch.Tensor, adapter_name: str, kind: str) -> torch.Tensor:
    """Return `value`, whose gradient the layer with this number masks as it arrives.

    Args:
        value: The delta of an adapter, of any shape.
        number: What `numbered` has returned for the layer.
        adapter_name: Name of the adapter.
        kind: `"weight"` or `"bias"`.
    """
    return _Masked.apply(value, number, adapter_name, kind)  # pyright: ignore[reportReturnType]


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, number, adapter_name, kind):
        ctx.save_for_backward(number)
        ctx.names = (adapter_name, kind)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        (number,) = ctx.saved_tensors
        return _mask(gradient, number, *ctx.names), None, None, None


@torch.library.custom_op("peft_sparsegrad::mask", mutates_args=(), **_NO_CUDA_GRAPH)
def _mask(gradient: torch.Tensor, number: torch.Tensor, adapter_name: str, kind: str) -> torch.Tensor:
    arriving = gradient.clone(memory_format=torch.contiguous_format)  # an operator's result is memory of its own
    _LAYERS[int(number.item())].mask_arriving_(arriving, adapter_name, kind)
    return arriving


@_mask.register_fake
def _(gradient: torch.Tensor, number: torch.Tensor, adapter_name: str, kind: str) -> torch.Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)
