"""The search for the basis of each group of layers, in the first sweeps of a warm-up (SparseGrad, section 3.1)."""

from __future__ import annotations

import torch

from ...common.training.distributed import copy_buffers_from_main, is_main_process, mean_over_ranks
from ...functional import (
    Accumulator,
    ColumnEnergy,
    Hosvd,
    ObservedGradient,
    SketchedHosvd,
    core_shape,
    hosvd_accumulator,
)
from ..basis import Basis


class BasisSearch:
    """Sums over gradients, for each basis that a warm-up has to find.

    Attributes:
        sums: The sums of each basis with a gradient so far; empty once the bases are found.
        found: What each basis was chosen from, on the main process alone; it is for the report.
        sweeps: Number of sweeps that have ended.
    """

    def __init__(self) -> None:
        self.sums: dict[Basis, Accumulator] = {}
        self.found: dict[Basis, Hosvd] = {}
        self.sweeps = 0

    def add(self, basis: Basis, gradient: ObservedGradient) -> None:
        """Add the mean of all ranks' gradients of one layer in one backward pass."""
        if basis not in self.sums:
            self.sums[basis] = _new_accumulator(basis, gradient.tensors[-1].device)
        gradient.add_to(self.sums[basis], mean_over_ranks)

    def sweeps_planned(self, budget: int) -> int:
        """Return the number of sweeps in a warm-up of `budget` passes: two if there is a sketch among the sums."""
        sketched = any(isinstance(accumulator, SketchedHosvd) for accumulator in self.sums.values())
        return 2 if sketched and budget >= 4 else 1

    def end_sweep(self) -> None:
        """End a sweep over batches, between two passes."""
        self.sweeps += 1
        for accumulator in self.sums.values():
            accumulator.finish_sweep(mean_over_ranks)

    def fill_in(self) -> None:
        """Give every basis what was found for it, the same on all ranks."""
        for basis, accumulator in self.sums.items():
            if is_main_process():
                self.found[basis] = accumulator.result()
                basis.choose(self.found[basis].U, self.found[basis].V)
            copy_buffers_from_main(basis)
        self.sums.clear()


def _new_accumulator(basis: Basis, device: torch.device) -> Accumulator:
    if basis.selects:
        return ColumnEnergy(basis.weight_shape[1], core_shape(*basis.weight_shape, basis.ranks)[1], device)
    return hosvd_accumulator(*basis.weight_shape, basis.ranks, device)
