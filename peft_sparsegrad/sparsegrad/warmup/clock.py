"""The time that a warm-up takes, and how many steps of training would take as long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WarmUpClock:
    """Stopwatch for a warm-up that tells the observing of gradients from the passes themselves.

    What a pass takes without the observing is taken for a training step of one pass: the forward and backward pass,
    and all that a loop does between two of them.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._observing = 0.0

    @property
    def runs(self) -> bool:
        """True from the first pass on."""
        return self._started is not None

    def start(self) -> None:
        self._started = time.perf_counter()

    @contextmanager
    def observing(self, device: torch.device) -> Iterator[None]:
        """Count the time in the block, which begins after a synchronisation with `device`, as observing."""
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._observing += time.perf_counter() - started

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return 0.0 if self._started is None else time.perf_counter() - self._started

    def steps_worth(self, passes: int) -> float | None:
        """Return how many training steps of one pass take as long as `passes` observed ones; None if not measured."""
        seconds = self.seconds()
        plain = seconds - self._observing
        return passes * seconds / plain if plain > 0 else None
