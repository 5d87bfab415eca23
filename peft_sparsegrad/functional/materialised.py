"""The SparseGrad layer with its weight written out, `y = x (W + V S Uᵀ)ᵀ + b`: fewer operations where tokens are many.

`delta_product` pays for the delta with every token, here it is added to the weight once in each pass. The sum is made
anew in the backward pass, not kept, so what is kept is what `delta_product` keeps. In 16 bits rounding the sum would
lose small values; the layer takes this path in float32 and float64 only.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .delta import core_matrix, values_gradient


def materialised_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    values: torch.Tensor,
    indices: torch.Tensor | None,
    U: torch.Tensor | None,
    V: torch.Tensor | None,
    core_shape: tuple[int, int],
    top_k: int | None = None,
    core_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x (weight + V S Uᵀ)ᵀ + bias`: what `delta_product` adds to a linear layer's output, with that output.

    Args:
        x: Input, shape (..., in), in the dtype of `weight`.
        weight: Frozen weight, shape (out, in).
        bias: Frozen bias, shape (out,), or None.
        values, indices, U, V, core_shape, top_k, core_sum: As in `delta_product`.

    Returns:
        Shape (..., out).
    """
    return _MaterialisedLinear.apply(  # pyright: ignore[reportReturnType]
        x, weight, bias, values, indices, U, V, core_shape, top_k, core_sum
    )


def materialising_pays(tokens: int, weight_shape: tuple[int, int], ranks: tuple[int | None, int | None]) -> bool:
    """Whether `materialised_linear` takes fewer operations than a linear layer and `delta_product`, by a clear margin.

    Both count multiply-adds, forward and backward. What the sum costs is counted twice, because it also goes through
    memory: at BERT base's width, on a CPU, 1.5 times the tokens at which the counts are equal gained 2%, 3 times 7%.

    Args:
        tokens: Rows of the input.
        weight_shape: (out, in).
        ranks: Columns (r_out, r_in) of V and U, None for the identity.
    """
    out_features, in_features = weight_shape
    r_out, r_in = out_features if ranks[0] is None else ranks[0], in_features if ranks[1] is None else ranks[1]
    per_token, once = 2 * r_out * r_in, 2 * out_features * in_features
    if ranks[1] is not None:
        per_token, once = per_token + in_features * r_in, once + 2 * r_out * r_in * in_features
    if ranks[0] is not None:
        per_token, once = per_token + r_out * out_features, once + 2 * out_features * r_out * in_features
    return tokens * per_token > 2 * once


def _sum(weight, values, indices, U, V, core_shape):
    """`weight + V S Uᵀ`, added up while the last product is formed."""
    core = core_matrix(values, indices, core_shape, weight.dtype)
    if V is None:
        return weight + core if U is None else torch.addmm(weight, core, U.T)
    return torch.addmm(weight, V, core if U is None else core @ U.T)


class _MaterialisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, values, indices, U, V, core_shape, top_k, core_sum):
        ctx.core_shape, ctx.top_k, ctx.core_sum = core_shape, top_k, core_sum
        xu = x if U is None or not values.requires_grad else x @ U
        ctx.save_for_backward(xu if values.requires_grad else None, weight, values, indices, U, V)
        return nn.functional.linear(x, _sum(weight, values, indices, U, V, core_shape), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        xu, weight, values, indices, U, V = ctx.saved_tensors
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _sum(weight, values, indices, U, V, ctx.core_shape)
        if ctx.needs_input_grad[3]:
            dz = dy if V is None else dy @ V
            dcore = dz.reshape(-1, dz.shape[-1]).T @ xu.reshape(-1, xu.shape[-1])
            dvalues = values_gradient(dcore, values, indices, ctx.top_k, ctx.core_sum)
        return dx, None, None, dvalues, None, None, None, None, None, None
