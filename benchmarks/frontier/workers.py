"""Runs in several processes that share a device: each loads model and data once, and takes the next due run."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.json_files import Record
from experiments.results import append_result, read_results

from .runs import Plan, Run
from .train import Workplace, execute, tidy

_place: Workplace | None = None  # of a worker process


@dataclass
class Campaign:
    """The runs of a plan, done until none is missing or the time is over.

    Attributes:
        plan: What to do.
        out: Results file, which says what has been done.
        model: Folder of the checkpoint.
        data: Folder of the data.
        device: `"cpu"` or `"cuda"`.
        workers: Processes.
        deadline: On the clock of `time.monotonic`; None for no limit. No run starts that would end later, if it took
            as long as the longest so far.
        failed: Methods with a run that failed, with the reason; nothing more is started of them.
    """

    plan: Plan
    out: Path
    model: Path
    data: Path
    device: str
    workers: int
    deadline: float | None
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    results: dict[Run, Record] = field(default_factory=dict)
    longest: float = 0.0

    def go(self) -> None:
        """Do the runs. Each result is on the disk as soon as it is there."""
        self.results = dict(read_results(self.out, Run)) if self.out.exists() else {}
        with self._pool() as pool:
            running: dict[Future[Record], Run] = {}
            while True:
                while len(running) < self.workers and (run := self._next(running.values())) is not None:
                    running[pool.submit(_execute, run)] = run
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finish(running.pop(future), future)

    def _pool(self) -> Executor:
        """Return the worker processes; a single worker is a thread of this one."""
        settings = (self.model, self.data, self.device, self.plan.precision, self.workers)
        if self.workers == 1:
            return ThreadPoolExecutor(1, initializer=_begin, initargs=settings)
        return ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _begin, settings)

    def _next(self, running: object) -> Run | None:
        if self.deadline is not None and time.monotonic() + self.longest > self.deadline:
            return None
        in_flight = set(running)  # pyright: ignore[reportArgumentType]
        runs = self.plan.missing(self.results)
        return next((run for run in runs if run not in in_flight and (run.task, run.method) not in self.failed), None)

    def _finish(self, run: Run, future: Future[Record]) -> None:
        error = future.exception()
        if error is not None:
            self.failed[run.task, run.method] = f"{type(error).__name__}: {error}"
            print(f"FAILED {run}: {self.failed[run.task, run.method]}", flush=True)
            return
        record = {**future.result(), "workers": self.workers}
        self.results[run] = record
        self.longest = max(self.longest, record["seconds"])
        append_result(self.out, run, record)
        print(f"{run}: {record['score']:.4f} in {record['seconds']:.1f} s", flush=True)


def _begin(model: Path, data: Path, device: str, precision: str, workers: int) -> None:
    global _place
    if workers > 1:
        torch.set_num_threads(1)  # the processes share the cores
    _place = Workplace(model, data, torch.device(device), precision)


def _execute(run: Run) -> Record:
    assert _place is not None
    try:
        return execute(_place, run)
    finally:
        tidy(_place.device)
