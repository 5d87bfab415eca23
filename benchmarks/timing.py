"""A stopwatch for wall-clock and CPU time that waits for the device."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Adds up the time spent inside `with` blocks, work queued on a GPU included.

    Attributes:
        seconds: Wall-clock time.
        cpu_seconds: CPU time of this process, all threads together: steadier where other programs are running.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.cpu_seconds = device, 0.0, 0.0

    def __enter__(self) -> Stopwatch:
        self._wait()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
