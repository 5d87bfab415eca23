"""One side of a basis: a transition matrix, chosen features of the weight's own basis, or all of them.

A side of a weight with n features is None (all of them, the identity), a matrix (n, r) with orthonormal columns, or
the numbers of r of the n features, integers in ascending order: the columns of the identity that they stand for are
never formed, and a product with them is a selection.
"""

from __future__ import annotations

import torch

Side = torch.Tensor | None


def is_selection(side: Side) -> bool:
    """Return whether a side is a selection of features."""
    return side is not None and not side.is_floating_point()


def side_in(side: Side, dtype: torch.dtype) -> Side:
    """Return a side for products in a dtype: a matrix in it, a selection as int64."""
    return None if side is None else side.to(torch.int64 if is_selection(side) else dtype)


def side_like(side: Side, tensor: torch.Tensor) -> Side:
    """Return a side for products with `tensor`, on its device: a matrix in its dtype, a selection as int64."""
    return None if side is None else side_in(side.to(tensor.device), tensor.dtype)


def rounded(side: Side) -> Side:
    """Return a side whose entries float16 can hold, in its own dtype.

    Orthonormal columns have no entry above 1, so float16, with three more bits than bfloat16, has no cost in range. A
    square matrix is returned as it is: it turns the whole weight, and the paper's layer turns it back. So is a side
    that is no matrix.
    """
    if side is None or is_selection(side) or side.shape[0] == side.shape[1]:
        return side
    return side.to(torch.float16).to(side.dtype)


def file_dtype(side: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a file holds a side: float16 where that loses nothing, else its own."""
    is_exact = not is_selection(side) and bool((side.to(torch.float16) == side).all())
    return torch.float16 if is_exact else side.dtype


def to_core(x: torch.Tensor, side: Side) -> torch.Tensor:
    """Return x (..., n) in the basis of the core, (..., r)."""
    if side is None:
        return x
    return x.index_select(-1, side) if is_selection(side) else x @ side


def from_core(z: torch.Tensor, side: Side, features: int) -> torch.Tensor:
    """Return z (..., r) in the weight's own basis, (..., n), for n `features`."""
    if side is None:
        return z
    if is_selection(side):
        return z.new_zeros(*z.shape[:-1], features).index_copy_(-1, side, z)
    return z @ side.T


def side_matrix(side: Side, features: int) -> torch.Tensor:
    """Return a side of n `features` as a matrix (n, r), float64 on the CPU; None as the identity."""
    if side is None:
        return torch.eye(features, dtype=torch.float64)
    if is_selection(side):
        return from_core(torch.eye(len(side), dtype=torch.float64), side.cpu().long(), features).T
    return side.cpu().double()
