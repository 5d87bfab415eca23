"""The SparseGrad layer as a delta on a frozen layer, with a backward pass written by hand.

    y = result + ((x U) Sᵀ) Vᵀ        ∂L/∂S = (∂L/∂y V)ᵀ (x U)        ∂L/∂x = ((∂L/∂y V) S) Uᵀ

U (in, r_in) and V (out, r_out) are frozen, so the backward pass needs x U in place of x, and the gradient of the full
weight (out, in) is never formed. With square U and V this is the layer of SparseGrad (2024.emnlp-main.831,
section 3.2) with the weight left where it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .core import Core, leaf_gradient
from .sparse_by_dense import sparse_by_dense


def delta_product(result: torch.Tensor, x: torch.Tensor, core: Core, skip_zeros: bool = False) -> torch.Tensor:
    """Return `result + ((x U) Sᵀ) Vᵀ`, computed in the dtype of `result`.

    Args:
        result: Output of the frozen layer, shape (..., out).
        x: Input of the frozen layer, shape (..., in).
        core: Core S with its transition matrices U and V.
        skip_zeros: Leave zero rows and columns out of the core's gradient product (paper, section 3.3).

    Returns:
        Tensor of shape (..., out), in the dtype of `result`, which may be modified in place.
    """
    return _DeltaProduct.apply(result, x.to(result.dtype), skip_zeros, *core)  # pyright: ignore[reportReturnType]


def delta_weight(core: Core) -> torch.Tensor:
    """Return `V S Uᵀ`, shape (out, in), in the dtype of the core's values."""
    core = core.on(core.values)
    delta = core.unrotate_input(core.matrix(core.values.dtype))
    return delta if core.V is None else core.V @ delta


def observe_gradient(
    result: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    observer: Callable[[torch.Tensor, torch.Tensor], bool],
    blocks: bool,
) -> torch.Tensor:
    """Return `result` unchanged and hand the layer's input and output gradient to `observer` in the backward pass.

    Args:
        result: Output of the layer, shape (..., out).
        x: Input of the layer, shape (..., in); kept for the backward pass.
        values: The layer's trained parameter. Its presence makes autograd run the backward pass down to this layer.
        observer: Called with x (tokens, in) and ∂L/∂y (tokens, out); returns whether it could use them.
        blocks: Give `values` a gradient of zeros, so that it does not change during the warm-up. If the observer
            could not use the gradient because it overflowed, the gradient given is Inf instead, so that a gradient
            scaler lowers its scale.

    Returns:
        Tensor in the memory of `result`, which may be modified in place wherever `result` itself may be.
    """
    return _ObserveGradient.apply(result, x, values, observer, blocks)  # pyright: ignore[reportReturnType]


class _DeltaProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, x, skip_zeros, *parts):
        ctx.x_shape = x.shape
        rows, x = result.reshape(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
        given = Core(*parts)
        core = given.on(result)
        xu = core.rotate_input(x)
        S = core.matrix(result.dtype)
        inner, outer = (xu, S) if core.V is None else (xu @ S.T, core.V)
        ctx.skip_zeros, ctx.sizes = skip_zeros, {"shape": given.shape, "in_features": given.in_features}
        ctx.save_for_backward(xu if given.values.requires_grad else None, *given[:4])
        # Detached, because autograd forbids to modify a view that was made in here.
        return torch.addmm(rows, inner, outer.T).view(result.shape).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        xu, *tensors = ctx.saved_tensors
        core = Core(*tensors, **ctx.sizes).on(dy)
        dz = core.rotate_output(dy.reshape(-1, dy.shape[-1]))
        dx = dvalues = dleaf = None
        if ctx.needs_input_grad[1]:
            dx = core.unrotate_input(dz @ core.matrix(dz.dtype)).view(ctx.x_shape)
        if ctx.needs_input_grad[3]:
            gradient = sparse_by_dense(dz.T, xu) if ctx.skip_zeros else dz.T @ xu
            dvalues = core.values_gradient(gradient)
            dleaf = leaf_gradient(gradient) if ctx.needs_input_grad[8] else None
        return (dy if ctx.needs_input_grad[0] else None), dx, None, dvalues, *(None,) * 4, dleaf, None


class _ObserveGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, x, values, observer, blocks):
        ctx.save_for_backward(x.reshape(-1, x.shape[-1]))
        ctx.observer, ctx.blocks, ctx.like = observer, blocks, (values.shape, values.dtype, values.device)
        return result.detach()  # the same memory, and no view for autograd, which forbids to modify one made in here

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        usable = ctx.observer(x, dy.reshape(-1, dy.shape[-1]))
        shape, dtype, device = ctx.like
        fill = 0.0 if usable else float("inf")
        dvalues = torch.full(shape, fill, dtype=dtype, device=device) if ctx.blocks else None
        return dy, None, dvalues, None, None
