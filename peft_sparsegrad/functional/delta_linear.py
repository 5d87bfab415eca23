"""A frozen linear layer with its SparseGrad delta in one operation, with a backward pass written by hand.

    y = x Wᵀ + b + ((x U) Sᵀ) Vᵀ        ∂L/∂x = ∂L/∂y W + ((∂L/∂y V) S) Uᵀ        ∂L/∂S = (∂L/∂y V)ᵀ (x U)

Both gradients of the input are formed in one tensor, where `delta_product` on the output of a layer has two, which are
then added. The delta is added to the output or, written out, to the weight, `y = x (W + V S Uᵀ)ᵀ + b`, which takes
fewer operations for many tokens. That sum is computed again in the backward pass, so that no more memory is kept. In
16 bits rounding it would lose small values, so it is for float32 and float64 only.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .core import Core, leaf_gradient
from .sides import is_selection

# Multiply-adds that take as long as copying an entry of the weight to add columns to it: measured on a CPU, where both
# ways were level at 256 tokens with a column in eight chosen, at BERT base's and SmolLM2's shapes.
COPIED_ENTRY = 16


def delta_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, core: Core, writes_out: bool = False
) -> torch.Tensor:
    """Return `x (weight + V S Uᵀ)ᵀ + bias`, equal to `delta_product` added to the linear layer's output.

    Args:
        x: Input, shape (..., in).
        weight: Frozen weight, shape (out, in).
        bias: Frozen bias, shape (out,), or None.
        core: Core S with its transition matrices U and V.
        writes_out: Add the delta to the weight; x, weight and bias are then of one dtype, outside of autocast.

    Returns:
        Tensor of shape (..., out), in the dtype of the linear layer's output, which may be modified in place.
    """
    return _DeltaLinear.apply(x, weight, bias, writes_out, *core)  # pyright: ignore[reportReturnType]


def writing_out_pays(
    tokens: int, weight_shape: tuple[int, int], ranks: tuple[int | None, int | None], selects: bool = False
) -> bool:
    """Return whether writing the weight out clearly takes fewer operations than adding the delta to the output.

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


def _written_out(weight: torch.Tensor, core: Core) -> torch.Tensor:
    """Return `weight + V S Uᵀ`, added up while the last product is formed."""
    S = core.matrix(weight.dtype)
    if core.V is not None:
        return torch.addmm(weight, core.V, core.unrotate_input(S))
    if core.U is None:
        return weight + S
    return weight.index_add(1, core.U, S) if is_selection(core.U) else torch.addmm(weight, S, core.U.T)


class _DeltaLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, writes_out, *parts):
        given, rows = Core(*parts), x.reshape(-1, x.shape[-1])
        trains = given.values.requires_grad
        if writes_out:
            core = given.on(weight)
            y = F.linear(rows, _written_out(weight, core), bias)
            xu = core.rotate_input(rows) if trains else None
        else:
            y = F.linear(rows, weight, bias)  # under autocast in its dtype
            core = given.on(y)
            xu = core.rotate_input(rows.to(y.dtype))
            y = core.add_output(y, xu)
        ctx.writes_out, ctx.x_shape = writes_out, x.shape
        ctx.sizes = {"shape": given.shape, "in_features": given.in_features}
        ctx.save_for_backward(xu if trains else None, weight, *given[:4])
        # Detached, because autograd forbids to modify a view that was made in here.
        return y.view(*x.shape[:-1], y.shape[-1]).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        xu, weight, *tensors = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        core = Core(*tensors, **ctx.sizes).on(dy)
        dz = core.rotate_output(dy)
        dx = dvalues = dleaf = None
        if ctx.needs_input_grad[0] and ctx.writes_out:
            dx = (dy @ _written_out(weight, core)).view(ctx.x_shape)
        elif ctx.needs_input_grad[0]:
            dx = core.add_input(dy @ weight.to(dy.dtype), dz @ core.matrix(dy.dtype)).view(ctx.x_shape)
        if ctx.needs_input_grad[4]:
            gradient = dz.T @ xu
            dvalues = core.values_gradient(gradient)
            dleaf = leaf_gradient(gradient) if ctx.needs_input_grad[9] else None
        return dx, None, None, None, dvalues, *(None,) * 4, dleaf, None
