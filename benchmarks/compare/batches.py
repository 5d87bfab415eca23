"""The order of the training rows: rows of about the same length share a batch, which saves padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

WINDOW = 10  # batches


class LengthWindows(Sampler[int]):
    """Rows in random order, sorted by length within windows of 10 batches, the batches shuffled again.

    transformers' `LengthGroupedSampler` draws from the global random numbers, which a method may disturb, and its
    windows are so large that a small training set is hardly shuffled.

    Args:
        lengths: Length of each row.
        batch_size: Rows in a batch.
        seed: The order is a function of it and of the epoch alone.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, by accelerate."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        full = len(rows) - len(rows) % self.batch_size
        windows = _slices(rows[:full], WINDOW * self.batch_size)
        batches = [batch for window in windows for batch in self._sorted(window)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        yield from rows[full:]  # the smaller batch has to be the last

    def _sorted(self, window: list[int]) -> list[list[int]]:
        return _slices(sorted(window, key=lambda row: self.lengths[row]), self.batch_size)


def _slices(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
