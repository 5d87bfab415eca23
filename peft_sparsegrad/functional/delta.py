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

from .sparse_by_dense import sparse_by_dense


def delta_product(
    result: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor | None,
    U: torch.Tensor | None,
    V: torch.Tensor | None,
    core_shape: tuple[int, int],
    top_k: int | None = None,
    skip_zeros: bool = False,
    core_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """`result + ((x U) Sᵀ) Vᵀ`, computed in the dtype of `result`.

    Args:
        result: Output of the frozen layer, shape (..., out).
        x: Its input, shape (..., in).
        values: Trained values of the core, shape (k,); with `indices=None` all r_out * r_in of them.
        indices: Flat positions of the values in the core, int64, shape (k,), or None for a dense core.
        U: Input transition matrix (in, r_in), or None for the identity.
        V: Output transition matrix (out, r_out), or None for the identity.
        core_shape: (r_out, r_in).
        top_k: If given, only this many entries of the values' gradient, the largest in magnitude, are kept: the
            paper's dynamic support.
        skip_zeros: Leave zero rows and columns out of the core's gradient product (paper, section 3.3).
        core_sum: If given, shape (r_out, r_in): the backward pass adds the gradient of the whole core to it, that of
            the entries outside the support included.

    Returns:
        Shape (..., out), dtype of `result`.
    """
    x = x.to(result.dtype)
    out = _DeltaProduct.apply(
        result.reshape(-1, result.shape[-1]), x.reshape(-1, x.shape[-1]), values, indices, U, V, core_shape, top_k,
        skip_zeros, core_sum,
    )  # fmt: skip
    return out.view(result.shape)  # pyright: ignore[reportOptionalMemberAccess]


def delta_weight(
    values: torch.Tensor,
    indices: torch.Tensor | None,
    U: torch.Tensor | None,
    V: torch.Tensor | None,
    core_shape: tuple[int, int],
) -> torch.Tensor:
    """`V S Uᵀ`, shape (out, in), in the dtype of `values`. Arguments as in `delta_product`."""
    delta = core_matrix(values, indices, core_shape, values.dtype)
    delta = delta if U is None else delta @ U.to(values.dtype).T
    return delta if V is None else V.to(values.dtype) @ delta


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
        x: Its input, shape (..., in); kept for the backward pass.
        values: The parameter whose presence keeps the backward pass alive below the first trainable layer.
        observer: Called with x (tokens, in) and ∂L/∂y (tokens, out); returns whether it could use them.
        blocks: Give `values` a gradient of zeros, so that it stays where it is while the warm-up watches; of Inf if
            the observer had no use for an overflow, so that a gradient scaler lowers its scale.

    Returns:
        Shape of `result`.
    """
    return _ObserveGradient.apply(result, x, values, observer, blocks)  # pyright: ignore[reportReturnType]


def core_matrix(
    values: torch.Tensor, indices: torch.Tensor | None, core_shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The core S (r_out, r_in) as a dense matrix. Arguments as in `delta_product`."""
    if indices is None:
        return values.to(dtype).view(core_shape)
    core = values.new_zeros(core_shape[0] * core_shape[1], dtype=dtype)
    return core.index_copy(0, indices, values.to(dtype)).view(core_shape)


def values_gradient(
    dcore: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor | None,
    top_k: int | None,
    core_sum: torch.Tensor | None,
) -> torch.Tensor:
    """∂L/∂values (k,) from the gradient of the core (r_out, r_in), which is added to `core_sum` on the way."""
    if core_sum is not None and (dcore.dtype != torch.float16 or torch.isfinite(dcore).all()):
        core_sum += dcore  # but for an overflow, whose step is skipped
    gradient = dcore.flatten() if indices is None else dcore.flatten()[indices]
    gradient = gradient if top_k is None else _keep_largest(gradient, top_k)
    return gradient.to(values.dtype)


def _keep_largest(gradient, k):
    """`gradient` (n,) with all but its `k` entries of largest magnitude set to zero."""
    if k >= gradient.numel():
        return gradient
    kept = gradient.abs().topk(k, sorted=False).indices
    return torch.zeros_like(gradient).index_copy(0, kept, gradient[kept])


class _DeltaProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, x, values, indices, U, V, core_shape, top_k, skip_zeros, core_sum):
        core = core_matrix(values, indices, core_shape, result.dtype)
        xu = x if U is None else x @ U
        inner, outer = (xu, core) if V is None else (xu @ core.T, V)
        ctx.core_shape, ctx.top_k, ctx.skip_zeros, ctx.core_sum = core_shape, top_k, skip_zeros, core_sum
        ctx.save_for_backward(xu if values.requires_grad else None, values, indices, U, V)
        return torch.addmm(result, inner, outer.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        xu, values, indices, U, V = ctx.saved_tensors
        dz = dy if V is None else dy @ V
        dx = dvalues = None
        if ctx.needs_input_grad[1]:
            dx = dz @ core_matrix(values, indices, ctx.core_shape, dz.dtype)
            dx = dx if U is None else dx @ U.T
        if ctx.needs_input_grad[2]:
            dcore = sparse_by_dense(dz.T, xu) if ctx.skip_zeros else dz.T @ xu
            dvalues = values_gradient(dcore, values, indices, ctx.top_k, ctx.core_sum)
        return (dy if ctx.needs_input_grad[0] else None), dx, dvalues, None, None, None, None, None, None, None


class _ObserveGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, x, values, observer, blocks):
        ctx.save_for_backward(x.reshape(-1, x.shape[-1]))
        ctx.observer, ctx.blocks, ctx.like = observer, blocks, (values.shape, values.dtype, values.device)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        usable = ctx.observer(x, dy.reshape(-1, dy.shape[-1]))
        shape, dtype, device = ctx.like
        fill = 0.0 if usable else float("inf")
        dvalues = torch.full(shape, fill, dtype=dtype, device=device) if ctx.blocks else None
        return dy, None, dvalues, None, None
