"""The SparseGrad layer with its weight written out, `y = x (W + V S Uᵀ)ᵀ + b`: fewer operations for many tokens.

`delta_product` multiplies the delta with every token; here it is added to the weight once in each pass. The sum is
computed again in the backward pass, so that no more memory is kept than with `delta_product`. In 16 bits rounding the
sum would lose small values, so the layer takes this path in float32 and float64 only.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .core import Core, leaf_gradient
from .sides import is_selection

# Multiply-adds that take as long as copying an entry of the weight to add columns to it: measured on a CPU, where both
# ways were level at 256 tokens with a column in eight chosen, at BERT base's and SmolLM2's shapes.
COPIED_ENTRY = 16


def materialised_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, core: Core) -> torch.Tensor:
    """Return `x (weight + V S Uᵀ)ᵀ + bias`, equal to `delta_product` added to the linear layer's output.

    Args:
        x: Input, shape (..., in), in the dtype of `weight`.
        weight: Frozen weight, shape (out, in).
        bias: Frozen bias, shape (out,), or None.
        core: Core S with its transition matrices U and V.

    Returns:
        Tensor of shape (..., out), which may be modified in place.
    """
    return _MaterialisedLinear.apply(x, weight, bias, *core)  # pyright: ignore[reportReturnType]


def materialising_pays(
    tokens: int, weight_shape: tuple[int, int], ranks: tuple[int | None, int | None], selects: bool = False
) -> bool:
    """Return whether `materialised_linear` clearly takes fewer operations than a linear layer and `delta_product`.

    Multiply-adds of the forward and backward pass are counted. The cost of the sum is counted twice, because it also
    goes through memory.

    Args:
        tokens: Rows of the input.
        weight_shape: (out, in).
        ranks: Columns (r_out, r_in) of V and U, None for the identity.
        selects: True if U chooses columns of the weight, so that no product with it is needed.
    """
    out_features, in_features = weight_shape
    r_out, r_in = out_features if ranks[0] is None else ranks[0], in_features if ranks[1] is None else ranks[1]
    per_token, once = 2 * r_out * r_in, 2 * out_features * in_features
    if selects:
        once *= COPIED_ENTRY
    if ranks[1] is not None and not selects:
        per_token, once = per_token + in_features * r_in, once + 2 * r_out * r_in * in_features
    if ranks[0] is not None:
        per_token, once = per_token + r_out * out_features, once + 2 * out_features * r_out * in_features
    return tokens * per_token > 2 * once


def _sum(weight, core):
    """Return `weight + V S Uᵀ`, added up while the last product is formed."""
    S = core.matrix(weight.dtype)
    if core.V is not None:
        return torch.addmm(weight, core.V, core.unrotate_input(S))
    if core.U is None:
        return weight + S
    return weight.index_add(1, core.U, S) if is_selection(core.U) else torch.addmm(weight, S, core.U.T)


class _MaterialisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *parts):
        given = Core(*parts)
        core = given.on(weight)
        ctx.sizes = {"shape": given.shape, "in_features": given.in_features}
        xu = core.rotate_input(x) if given.values.requires_grad else None
        ctx.save_for_backward(xu, weight, *given[:4])
        # Detached, because autograd forbids to modify a view that was made in here.
        return nn.functional.linear(x, _sum(weight, core), bias).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        xu, weight, *tensors = ctx.saved_tensors
        core = Core(*tensors, **ctx.sizes).on(dy)
        dx = dvalues = dleaf = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _sum(weight, core)
        if ctx.needs_input_grad[3]:
            dz = core.rotate_output(dy)
            gradient = dz.reshape(-1, dz.shape[-1]).T @ xu.reshape(-1, xu.shape[-1])
            dvalues = core.values_gradient(gradient)
            dleaf = leaf_gradient(gradient) if ctx.needs_input_grad[8] else None
        return dx, None, None, dvalues, *(None,) * 4, dleaf, None
