"""Layers with trainable deltas on frozen weights, whose backward pass masks the deltas' gradients.

    y = f(x; W + Σ Δ, b + Σ Δ_b)        ∂L/∂Δ = m ⊙ ∂L/∂(W + Σ Δ)

`W + Σ Δ` is not kept for the backward pass but added up again, which is cheap next to the products with it. The mask
is applied inside the backward pass, where nothing that happens to a parameter object can lose it, and the gradient of
a delta that keeps nothing in this step is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Delta:
    """The tensor that one adapter adds to one parameter, and how its gradient is masked.

    Attributes:
        value: The trained tensor, of the parameter's shape.
        mask: Function that masks the gradient, which is contiguous and has the dtype of `value`; may work in place.
            None if `value` masks its gradient itself.
        trains: False if no entry of `value` trains in this step, so that its gradient is not computed.
        zeros: True if the gradient of a delta that does not train is zero rather than None.
    """

    value: torch.Tensor
    mask: Callable[[torch.Tensor], torch.Tensor] | None
    trains: bool = True
    zeros: bool = False


class Operation(Protocol):
    """A layer's arithmetic, and the three parts of its backward pass."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor, x_shape: torch.Size) -> torch.Tensor: ...

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight_shape: torch.Size) -> torch.Tensor: ...

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class LinearOperation:
    """`x Wᵀ + b`, x (..., in). The weight is (out, in), or with `transposed`, as in Conv1D, (in, out)."""

    transposed: bool = False

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = F.linear(_rows(x), weight.T if self.transposed else weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor, x_shape: torch.Size) -> torch.Tensor:
        return (_rows(dy) @ (weight.T if self.transposed else weight)).view(x_shape)

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight_shape: torch.Size) -> torch.Tensor:
        dy, x = _rows(dy), _rows(x)
        return x.T @ dy if self.transposed else dy.T @ x

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        return _rows(dy).sum(0)


@dataclass(frozen=True)
class Conv2dOperation:
    """A convolution padded with zeros; x (batch, in, height, width), weight (out, in / groups, kernel, kernel)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, dy: torch.Tensor, weight: torch.Tensor, x_shape: torch.Size) -> torch.Tensor:
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return torch.nn.grad.conv2d_input(x_shape, weight, dy, *settings)  # pyright: ignore

    def weight_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight_shape: torch.Size) -> torch.Tensor:
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return torch.nn.grad.conv2d_weight(x, weight_shape, dy, *settings)  # pyright: ignore

    def bias_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        return dy.sum((0, 2, 3))


def masked_layer(
    operation: Operation,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_deltas: Sequence[Delta],
    bias_deltas: Sequence[Delta] = (),
) -> torch.Tensor:
    """Return the operation's output with `weight + Σ Δ` and `bias + Σ Δ_b`, computed in the dtype of `x`.

    Args:
        operation: The layer's arithmetic.
        x: Input of the layer.
        weight: The frozen weight, or None for zero, so that only the deltas' part of the output is computed.
        bias: The frozen bias, or None for zero.
        weight_deltas: Deltas of the weight, at least one.
        bias_deltas: Deltas of the bias, any number.

    Returns:
        The output, in the dtype of `x`, which may be modified in place.
    """
    deltas = (tuple(weight_deltas), tuple(bias_deltas))
    values = [delta.value for delta in (*weight_deltas, *bias_deltas)]
    if all(delta.mask is None for delta in weight_deltas):
        return _output(operation, x, weight, bias, values[: len(weight_deltas)], values[len(weight_deltas) :])
    return _MaskedLayer.apply(operation, x, weight, bias, deltas, *values)  # pyright: ignore[reportReturnType]


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_deltas: Sequence[Delta],
    bias_deltas: Sequence[Delta] = (),
    transposed: bool = False,
) -> torch.Tensor:
    """Return `masked_layer` of a linear layer for x (..., in); the result has shape (..., out)."""
    return masked_layer(LinearOperation(transposed), x, weight, bias, weight_deltas, bias_deltas)


def masked_sum(parameter: torch.Tensor, deltas: Sequence[Delta]) -> torch.Tensor:
    """Return `parameter + Σ Δ`, for modules that keep little of it, such as normalisation layers and embeddings.

    Args:
        parameter: Frozen parameter of any shape.
        deltas: Deltas of the parameter, at least one.

    Returns:
        Tensor with the shape and dtype of `parameter`. Its masked gradient reaches the deltas, but not `parameter`.
    """
    if all(delta.mask is None for delta in deltas):
        return _total(parameter, [delta.value for delta in deltas], parameter.dtype)  # pyright: ignore[reportReturnType]
    return _MaskedSum.apply(parameter, tuple(deltas), *(delta.value for delta in deltas))  # pyright: ignore


class _MaskedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operation, x, weight, bias, deltas, *values):
        ctx.operation, ctx.deltas, ctx.x_shape = operation, deltas, x.shape
        weight_values, bias_values = values[: len(deltas[0])], values[len(deltas[0]) :]
        kept = x if any(delta.trains and delta.value.requires_grad for delta in deltas[0]) else None
        ctx.save_for_backward(kept, weight, *weight_values)
        # Detached, because autograd forbids to modify a view that was made in here.
        return _output(operation, x, weight, bias, weight_values, bias_values).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, *weight_values = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[1]:
            dx = ctx.operation.input_gradient(dy, _total(weight, weight_values, dy.dtype), ctx.x_shape)
        weight_deltas, bias_deltas = ctx.deltas
        needed = ctx.needs_input_grad[5:]
        dweights = _gradients(
            weight_deltas,
            needed[: len(weight_deltas)],
            lambda: ctx.operation.weight_gradient(dy, x, weight_values[0].shape),
        )
        dbiases = _gradients(bias_deltas, needed[len(weight_deltas) :], lambda: ctx.operation.bias_gradient(dy))
        return None, dx, None, None, None, *dweights, *dbiases


class _MaskedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, deltas, *values):
        ctx.deltas = deltas
        return _total(parameter, values, parameter.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *_gradients(ctx.deltas, ctx.needs_input_grad[2:], lambda: dy.clone())


def _rows(tensor):
    """Return a tensor (..., n) as a matrix (rows, n), where n may be 0."""
    return tensor.flatten(0, -2) if tensor.ndim > 1 else tensor.unsqueeze(0)


def _output(operation, x, weight, bias, weight_values, bias_values):
    """Return the operation's output with the deltas' values added to weight and bias, in the dtype of `x`."""
    with torch.autocast(x.device.type, enabled=False):
        return operation.forward(x, _total(weight, weight_values, x.dtype), _total(bias, bias_values, x.dtype))


def _total(frozen, values, dtype):
    """Return the sum of a frozen tensor (or None) and the deltas' values in `dtype`, None if there is none of them."""
    terms = [*([] if frozen is None else [frozen.detach()]), *values]
    return sum(terms[1:], start=terms[0]).to(dtype) if terms else None


def _gradients(deltas, needed, compute):
    """Return the masked gradient of each delta; `compute` returns the unmasked one, in memory that may be changed."""
    training = [delta.trains and need for delta, need in zip(deltas, needed, strict=True)]
    common = [compute()] if any(training) else []
    gradients = []
    for delta, trains, need in zip(deltas, training, needed, strict=True):
        if trains:
            own = common[0].clone() if sum(training) > 1 else common[0]  # a mask works in place
            gradients.append(delta.mask(own.to(delta.value.dtype).contiguous()))
        else:
            gradients.append(torch.zeros_like(delta.value) if need and delta.zeros else None)
    return gradients
