"""One basis for the cores of several adapters: theirs if they have the same, otherwise one that spans all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..functional import Side, is_selection, side_matrix
from .basis import Basis


class JoinedBasis(NamedTuple):
    """A basis in which every core of some others can be expressed.

    Attributes:
        U: Input transition matrix (in, r_in), float32, or chosen columns, int32 (r_in,), or None for the identity.
        V: Output transition matrix (out, r_out), float32, or None for the identity.
        from_each: For each of the others, by its place, the matrices (A_V, A_U) with V A_V = Vᵢ and U A_U = Uᵢ, which
            turn its core into A_V S A_Uᵀ; None for a side on which all are equal.
    """

    U: Side
    V: Side
    from_each: list[tuple[torch.Tensor | None, torch.Tensor | None]]

    @property
    def is_shared(self) -> bool:
        """True if there is one basis, in which cores have the entries that they had."""
        return len(self.from_each) == 1

    @property
    def keeps_entries(self) -> bool:
        """True if every entry of a core is one entry in this basis: it is shared, or made of the weight's columns."""
        return self.is_shared or (is_selection(self.U) and self.V is None)

    def core(self, place: int, core: torch.Tensor) -> torch.Tensor:
        """Return the core (r_out, r_in) of the basis at a place of the others, expressed in this one."""
        from_V, from_U = self.from_each[place]
        core = core if from_V is None else from_V.to(core) @ core
        return core if from_U is None else core @ from_U.to(core).T


def join(bases: Sequence[Basis]) -> JoinedBasis:
    """Return the basis that spans all of `bases`, which differ and are for weights of one shape.

    The columns of all are made orthonormal, as every basis in a file is, by a QR decomposition. So the rank is the
    sum of theirs, at most the dimension, and cores that were sparse are dense in it.
    """
    U, from_U = _join_side([basis.U for basis in bases], bases[0].weight_shape[1])
    V, from_V = _join_side([basis.V for basis in bases], bases[0].weight_shape[0])
    return JoinedBasis(U, V, list(zip(from_V, from_U, strict=True)))


def same(one: Basis, other: Basis) -> bool:
    """Return whether two bases have the same matrices."""
    return all(_same(getattr(one, side), getattr(other, side)) for side in "UV")


def _join_side(sides: Sequence[Side], features: int) -> tuple[Side, Sequence[torch.Tensor | None]]:
    first = sides[0]
    if all(_same(first, side) for side in sides):
        return first, [None] * len(sides)
    matrices = [side_matrix(side, features) for side in sides]
    if any(side is None for side in sides):  # the weight's own basis spans every other
        return None, [None if side is None else matrix for side, matrix in zip(sides, matrices, strict=True)]
    if all(map(is_selection, sides)):
        chosen = torch.cat([side.cpu() for side in sides]).unique()  # pyright: ignore[reportOptionalMemberAccess]
        return chosen, [matrix[chosen.long()] for matrix in matrices]
    q, r = torch.linalg.qr(torch.cat(matrices, 1))
    return q.float(), r.split([each.shape[1] for each in matrices], 1)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other.to(one.device))
