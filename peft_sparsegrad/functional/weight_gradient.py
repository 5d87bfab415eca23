"""The gradient `G = dyᵀ x` (out, in) of a linear layer's weight, of which a backward pass gives the two factors."""

from __future__ import annotations

import torch

from .sides import Side, side_like, to_core


def weight_gradient(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Return `dyᵀ x` (out, in), in at least float32, for x (tokens, in) and dy (tokens, out)."""
    x, dy = factors(x, dy)
    return at_least_float32(dy.T @ x)


def gradient_energy(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Return ‖dyᵀ x‖² for x (tokens, in) and dy (tokens, out), computed from the smaller of two equal products."""
    tokens, out_features, in_features = x.shape[0], dy.shape[1], x.shape[1]
    if tokens * (out_features + in_features) < out_features * in_features:
        x, dy = factors(x, dy)
        return (at_least_float32(x @ x.T) * at_least_float32(dy @ dy.T)).sum()
    return weight_gradient(x, dy).square().sum()


def core_gradient(x: torch.Tensor, dy: torch.Tensor, U: Side, V: Side) -> torch.Tensor:
    """Return `G̃ = (dy V)ᵀ (x U)`, shape (r_out, r_in), in at least float32."""
    x, dy = factors(x, dy)
    return at_least_float32(to_core(dy, side_like(V, dy)).T @ to_core(x, side_like(U, x)))


def factors(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and dy in the dtype in which the gradient is computed.

    That is bfloat16 where the layer's output has it, as autograd computes the gradient of such a layer's weight: its
    rounding is that of x and dy themselves, and on a GPU float32 takes many times as long. In float16 the gradient
    may overflow, and it is at least float32.
    """
    dtype = dy.dtype if dy.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), dy.to(dtype)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is in float32 or float64, and in float32 from 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
