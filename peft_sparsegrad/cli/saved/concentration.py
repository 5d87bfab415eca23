"""The fewest of many values that carry most of their energy."""

from __future__ import annotations

import torch

_BITS_IN_A_BIN = 16


def fewest_with_share(values: torch.Tensor, share: float) -> int:
    """Return how many of the values, the largest ones, have this share of their sum of squares; 0 if all are zero.

    Only the magnitudes next to the last of them are sorted, since a GradDrop delta may have 10^8.
    """
    magnitudes = values.flatten().float().abs()
    squares = magnitudes.double().square()
    wanted = share * squares.sum()
    if not wanted > 0:
        return 0
    bins = magnitudes.view(torch.int32) >> _BITS_IN_A_BIN  # the bits of a float are in the order of its magnitude
    energy = torch.bincount(bins, weights=squares).flip(0).cumsum(0)
    last = int((energy < wanted).sum().clamp(max=len(energy) - 1))
    above = bins > len(energy) - 1 - last
    inside = squares[bins == len(energy) - 1 - last].sort(descending=True).values
    reached = (squares[above].sum() + inside.cumsum(0)) >= wanted
    return int(above.sum()) + min(int((~reached).sum()) + 1, len(inside))
