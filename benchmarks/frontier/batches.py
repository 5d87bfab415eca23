"""Batches of a run, all made before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.compare.batches import LengthWindows


def batch_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Return the rows of each of `steps` full batches: rows of about the same length share one, in random order.

    Args:
        lengths: Length of each row.
        batch_size: Rows in a batch; there must be as many.
        steps: Number of batches.
        seed: Decides the order alone.
    """
    rows = _endless(LengthWindows(lengths, batch_size, seed), len(lengths) - len(lengths) % batch_size)
    return [[next(rows) for _ in range(batch_size)] for _ in range(steps)]


def _endless(order: LengthWindows, in_full_batches: int) -> Iterator[int]:
    epoch = 0
    while True:
        order.set_epoch(epoch)
        rows = iter(order)
        yield from (next(rows) for _ in range(in_full_batches))
        epoch += 1
