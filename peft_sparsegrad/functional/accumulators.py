"""The sums over gradients in which a basis is found, and the choice between exact Gram matrices and a sketch."""

from __future__ import annotations

import torch

from .column_energy import ColumnEnergy
from .eigenvectors import sketch_size
from .hosvd import ExactHosvd, Ranks
from .hosvd_sketch import SketchedHosvd

Accumulator = ExactHosvd | SketchedHosvd | ColumnEnergy

# Above this dimension a Gram matrix and its eigenvectors cost more than a sketch of it.
EXACT_LIMIT = 1024


def hosvd_accumulator(
    out_features: int, in_features: int, ranks: Ranks, device: torch.device | str = "cpu"
) -> ExactHosvd | SketchedHosvd:
    """Return the accumulator for a layer: exact up to `EXACT_LIMIT` or if most columns are wanted, else a sketch."""
    wanted = [(r, n) for r, n in zip(ranks, (out_features, in_features), strict=True) if r is not None]
    wide = all(2 * sketch_size(r) >= n for r, n in wanted)
    kind = ExactHosvd if wide or max(n for _, n in wanted) <= EXACT_LIMIT else SketchedHosvd
    return kind(out_features, in_features, ranks, device)
