"""Deltas on weights that a module keeps in one parameter and uses as it likes, such as those of a mixture's experts.

    W_e + V S_e Uᵀ for every expert e        ∂L/∂S_e = Vᵀ (∂L/∂W_e) U

Such a module has no input and output of its own for each weight, so the sum is formed before it runs, and its backward
pass hands over the gradient of the whole parameter. The cores of the experts are kept one below the other, as one core
of shape (experts * r_out, r_in). A parameter with one weight (out, in) is one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .core import Core, leaf_gradient
from .sides import Side, side_like, to_core


def stacked_sum(weight: torch.Tensor, core: Core, num_experts: int) -> torch.Tensor:
    """Return `W_e + V S_e Uᵀ` for every expert, in the shape and dtype of `weight`.

    Args:
        weight: Frozen weights, shape (experts, out, in), or (out, in) for one.
        core: Cores of the experts one below the other, with their common transition matrices.
        num_experts: Number of experts.
    """
    return _StackedSum.apply(weight, num_experts, *core)  # pyright: ignore[reportReturnType]


def stacked_delta(core: Core, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Return `V S_e Uᵀ` for every expert, shape (experts, out, in)."""
    S = core.matrix(dtype).view(num_experts, -1, core.shape[1])
    core = core.on(S)
    delta = core.unrotate_input(S)
    return delta if core.V is None else core.V @ delta


def stacked_core_gradient(gradient: torch.Tensor, U: Side, V: Side, num_experts: int) -> torch.Tensor:
    """Return `Vᵀ G_e U` for every expert, (experts * r_out, r_in), for the weights' gradient G in its own dtype."""
    gradient = gradient.view(num_experts, *gradient.shape[-2:])
    gradient = gradient if V is None else V.to(gradient).T @ gradient
    gradient = to_core(gradient, side_like(U, gradient))
    return gradient.reshape(-1, gradient.shape[-1])


def observe_weight_gradient(
    weight: torch.Tensor, values: torch.Tensor, observer: Callable[[torch.Tensor], bool], blocks: bool
) -> torch.Tensor:
    """Return `weight` unchanged and hand its gradient to `observer` in the backward pass, see `observe_gradient`."""
    return _ObserveWeightGradient.apply(weight, values, observer, blocks)  # pyright: ignore[reportReturnType]


class _StackedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, num_experts, *parts):
        core = Core(*parts)
        ctx.num_experts, ctx.sizes = num_experts, {"shape": core.shape, "in_features": core.in_features}
        ctx.save_for_backward(*core[:4])
        with torch.autocast(weight.device.type, enabled=False):  # the sum has to have the weight's dtype
            return weight + stacked_delta(core, num_experts, weight.dtype).view(weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dweight):  # pyright: ignore[reportIncompatibleMethodOverride]
        core = Core(*ctx.saved_tensors, **ctx.sizes)
        dvalues = dleaf = None
        if ctx.needs_input_grad[2]:
            gradient = stacked_core_gradient(dweight, core.U, core.V, ctx.num_experts)
            dvalues = core.values_gradient(gradient)
            dleaf = leaf_gradient(gradient) if ctx.needs_input_grad[7] else None
        return (dweight if ctx.needs_input_grad[0] else None), None, dvalues, *(None,) * 4, dleaf, None


class _ObserveWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, values, observer, blocks):
        ctx.observer, ctx.blocks, ctx.like = observer, blocks, (values.shape, values.dtype, values.device)
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dweight):  # pyright: ignore[reportIncompatibleMethodOverride]
        usable = ctx.observer(dweight)
        shape, dtype, device = ctx.like
        fill = 0.0 if usable else float("inf")
        dvalues = torch.full(shape, fill, dtype=dtype, device=device) if ctx.blocks else None
        return (dweight if ctx.needs_input_grad[0] else None), dvalues, None, None
