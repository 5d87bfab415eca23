"""The shape of a weight that SparseGrad adapted, from the sizes of what the adapter file holds for it.

A side with a transition matrix is in the file: that matrix has a row for each of its features. The other side, the
wider one under `rank="auto"`, only shows in the size of the core. It is the one that gives every tensor the size that
it has; where several would, the files do not tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...functional import core_ranks, core_shape, num_trained_values, packed_support_size
from ...functional.core import Rank
from .adapter import TensorInfo


@dataclass(frozen=True)
class CoreSizes:
    """Sizes in the file for one layer.

    Attributes:
        U: Shape (in, r_in) of the input transition matrix, or None for the identity.
        V: Shape (out, r_out) of the output transition matrix, or None for the identity.
        values: Number of values.
        packed: The packed support, or None where the whole core trains.
    """

    U: tuple[int, int] | None
    V: tuple[int, int] | None
    values: int
    packed: TensorInfo | None

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        """Columns of (V, U)."""
        return (None if self.V is None else self.V[1]), (None if self.U is None else self.U[1])


def weight_shape(
    sizes: CoreSizes, density: float, num_values: int | None, rank: Rank, slack: float
) -> tuple[int, int] | None:
    """(out, in), or None if no shape, or more than one, goes with the sizes.

    Args:
        sizes: What is in the file.
        density: Setting of the layer, like the three that follow.
        num_values: As in `SparseGradConfig`.
        rank: As in `SparseGradConfig`.
        slack: As in `SparseGradConfig`.
    """
    if sizes.U is not None and sizes.V is not None:
        return sizes.V[0], sizes.U[0]
    columns = sizes.U[1] if sizes.U is not None else sizes.V[1] if sizes.V is not None else 0
    if not columns:
        return None
    shapes = [_with_other_side(sizes, size) for size in _possible_sizes(sizes, columns)]
    if sizes.packed is not None:
        shapes = [shape for shape in shapes if num_trained_values(*shape, density, num_values) == sizes.values]
    found = [shape for shape in shapes if _gives(sizes, shape, rank, slack)]
    return found[0] if len(found) == 1 else None


def _with_other_side(sizes: CoreSizes, size: int) -> tuple[int, int]:
    if sizes.V is not None:
        return sizes.V[0], size
    assert sizes.U is not None
    return size, sizes.U[0]


def _possible_sizes(sizes: CoreSizes, columns: int) -> range:
    """Sizes of the other side, of which the core has `columns` entries each."""
    if sizes.packed is None:
        exact = sizes.values // columns
        return range(exact, exact + 1)
    if sizes.packed.dtype != "U8":  # positions, whose number says nothing of the core
        return range(0)
    bits = 8 * sizes.packed.numel
    return range(max(1, (bits - 8) // columns), bits // columns + 1)


def _gives(sizes: CoreSizes, shape: tuple[int, int], rank: Rank, slack: float) -> bool:
    """Whether the layer of a weight of that shape would have a core and a support of these sizes."""
    rows, columns = core_shape(*shape, sizes.ranks)
    if sizes.packed is None:
        return rows * columns == sizes.values
    try:
        ranks = core_ranks(*shape, sizes.values, rank, slack)
    except ValueError:  # the values do not fit: the layer would have been refused
        return False
    if ranks != sizes.ranks:
        return False
    size, dtype = packed_support_size(rows * columns, sizes.values)
    return sizes.packed.shape == (size,) and dtype is torch.uint8
