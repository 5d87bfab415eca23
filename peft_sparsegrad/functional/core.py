"""The core: the small sparse matrix that trains, and the basis in which it is expressed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Core(NamedTuple):
    """The sparse core S (r_out, r_in) of a layer's delta `ΔW = V S Uᵀ`.

    A tuple, so that its tensors can be passed to an autograd function one by one.

    Attributes:
        values: Trained entries of S, shape (k,); with `indices=None` all r_out * r_in of them.
        indices: Flat positions of the values in S, int64, shape (k,), or None for a dense core.
        U: Input transition matrix (in, r_in), or None for the identity.
        V: Output transition matrix (out, r_out), or None for the identity.
        shape: (r_out, r_in).
        leaf: Tensor (r_out, r_in) that requires a gradient and receives that of the whole core, including the entries
            outside the support. Its contents are not read. None if nobody needs that gradient, and for a dense core,
            whose values have it already.
    """

    values: torch.Tensor
    indices: torch.Tensor | None
    U: torch.Tensor | None
    V: torch.Tensor | None
    shape: tuple[int, int]
    leaf: torch.Tensor | None = None

    def on(self, tensor: torch.Tensor) -> Core:
        """Return this core with U and V on the device and in the dtype of `tensor`."""
        U = None if self.U is None else self.U.to(tensor.device, tensor.dtype)
        V = None if self.V is None else self.V.to(tensor.device, tensor.dtype)
        return self._replace(U=U, V=V)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return S as a dense matrix (r_out, r_in)."""
        if self.indices is None:
            return self.values.to(dtype).view(self.shape)
        entries = self.values.new_zeros(self.shape[0] * self.shape[1], dtype=dtype)
        return entries.index_copy(0, self.indices, self.values.to(dtype)).view(self.shape)

    def scaled(self, factor: float) -> Core:
        """Return the core times a factor, which the gradients of its values and of its leaf have too.

        Computed in float32 at least, so that the product of 16-bit values is not rounded.
        """
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        leaf = None if self.leaf is None else self.leaf * factor
        return self._replace(values=self.values.to(dtype) * factor, leaf=leaf)

    def rotate_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x U`: inputs (..., in) in the basis of the core, (..., r_in)."""
        return x if self.U is None else x @ self.U

    def rotate_output(self, dy: torch.Tensor) -> torch.Tensor:
        """Return `dy V`: output gradients (..., out) in the basis of the core, (..., r_out)."""
        return dy if self.V is None else dy @ self.V

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
