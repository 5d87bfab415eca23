"""The core: the small sparse matrix that trains, and the basis in which it is expressed."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .sides import Side, from_core, is_selection, side_like, to_core


class Core(NamedTuple):
    """The sparse core S (r_out, r_in) of a layer's delta `ΔW = V S Uᵀ`.

    A tuple, so that its tensors can be passed to an autograd function one by one.

    Attributes:
        values: Trained entries of S, shape (k,); with `indices=None` all r_out * r_in of them.
        indices: Flat positions of the values in S, int64, shape (k,), or None for a dense core.
        U: Input transition matrix (in, r_in), or the numbers of r_in input features (see `sides`), or None for the
            identity.
        V: Output transition matrix (out, r_out), or None for the identity.
        shape: (r_out, r_in).
        leaf: Tensor (r_out, r_in) that requires a gradient and receives that of the whole core, including the entries
            outside the support. Its contents are not read. None if nobody needs that gradient, and for a dense core,
            whose values have it already.
        in_features: Columns of the weight; needed if U is a selection of them.
    """

    values: torch.Tensor
    indices: torch.Tensor | None
    U: Side
    V: Side
    shape: tuple[int, int]
    leaf: torch.Tensor | None = None
    in_features: int | None = None

    def on(self, tensor: torch.Tensor) -> Core:
        """Return this core with U and V for products with `tensor`, see `side_like`."""
        return self._replace(U=side_like(self.U, tensor), V=side_like(self.V, tensor))

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return S as a dense matrix (r_out, r_in)."""
        if self.indices is None:
            return self.values.to(dtype).view(self.shape)
        entries = self.values.new_zeros(self.shape[0] * self.shape[1], dtype=dtype)
        return entries.index_copy_(0, self.indices, self.values.to(dtype)).view(self.shape)

    def scaled(self, factor: float) -> Core:
        """Return the core times a factor, which the gradients of its values and of its leaf have too.

        Computed in float32 at least, so that the product of 16-bit values is not rounded.
        """
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        leaf = None if self.leaf is None else self.leaf * factor
        return self._replace(values=self.values.to(dtype) * factor, leaf=leaf)

    def rotate_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x U`: inputs (..., in) in the basis of the core, (..., r_in)."""
        return to_core(x, self.U)

    def unrotate_input(self, z: torch.Tensor) -> torch.Tensor:
        """Return `z Uᵀ`: (..., r_in) in the basis of the core as inputs (..., in)."""
        return from_core(z, self.U, self.in_features or self.shape[1])

    def rotate_output(self, dy: torch.Tensor) -> torch.Tensor:
        """Return `dy V`: output gradients (..., out) in the basis of the core, (..., r_out)."""
        return dy if self.V is None else dy @ self.V

    def add_output(self, y: torch.Tensor, xu: torch.Tensor) -> torch.Tensor:
        """Return `y + xu Sᵀ Vᵀ` in the memory of y (tokens, out), for rotated inputs xu (tokens, r_in)."""
        S = self.matrix(y.dtype)
        return y.addmm_(xu, S.T) if self.V is None else y.addmm_(xu @ S.T, self.V.T)

    def add_input(self, dx: torch.Tensor, dxu: torch.Tensor) -> torch.Tensor:
        """Return `dx + dxu Uᵀ` in the memory of dx (tokens, in), for (tokens, r_in) in the basis of the core."""
        if self.U is None:
            return dx.add_(dxu)
        return dx.index_add_(1, self.U, dxu) if is_selection(self.U) else dx.addmm_(dxu, self.U.T)

    def values_gradient(self, core_gradient: torch.Tensor) -> torch.Tensor:
        """Return ∂L/∂values (k,) computed from ∂L/∂S (r_out, r_in)."""
        gradient = core_gradient.flatten()
        gradient = gradient if self.indices is None else gradient[self.indices]
        return gradient.to(self.values.dtype)


def leaf_gradient(core_gradient: torch.Tensor) -> torch.Tensor:
    """Return ∂L/∂S (r_out, r_in) as the gradient of a core's `leaf`: with zeros where a float16 entry overflowed.

    Outside the support an entry may overflow while the values' gradient is finite, so that no gradient scaler skips
    the step.
    """
    return core_gradient.nan_to_num(0.0, 0.0, 0.0) if core_gradient.dtype == torch.float16 else core_gradient
