"""Runs of the frontier, and which of them are still to be done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from experiments.json_files import Record
from experiments.runs import BaseRun

from .methods import FACTOR, METHODS, rounded

EXTENSIONS = 2  # rates that a grid may get beyond each of its ends


@dataclass(frozen=True)
class Run(BaseRun):
    """Everything that decides what a run does.

    Attributes:
        steps: Backward passes, those of a warm-up included.
        batch_size: Sentences or conversations in a batch.
        precision: `"bf16"`: frozen weights in bf16, trained ones in float32, autocast; `"float32"`; `"tf32"`: float32
            whose products are computed in TF32.
    """

    PROGRAM: ClassVar[str] = "benchmarks.frontier"

    steps: int
    batch_size: int
    precision: str

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """The runs of one invocation: each task and method on the first seed at every rate, then all seeds at the best.

    Attributes:
        rates: Learning rates at which all seeds are to be run, in place of the search; None to search.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    precision: str
    rates: tuple[float, ...] | None = None

    def missing(self, results: Mapping[Run, Record]) -> Iterator[Run]:
        """Yield the runs that the results lack, as far as they are known by now, the most valuable first."""
        for method in self.methods:
            for task in self.tasks:
                yield from (run for run in self._wanted(task, method, results) if run not in results)

    def run(self, task: str, method: str, seed: int, lr: float) -> Run:
        return Run(
            self.model, task, method, seed, lr, steps=self.steps, batch_size=self.batch_size, precision=self.precision
        )

    def _wanted(self, task: str, method: str, results: Mapping[Run, Record]) -> list[Run]:
        if self.rates is not None:
            return [self.run(task, method, seed, rate) for seed in self.seeds for rate in self.rates]
        rates = list(METHODS[method].rates)
        while True:
            search = {rate: self.run(task, method, self.seeds[0], rate) for rate in rates}
            if any(run not in results for run in search.values()):
                return list(search.values())
            best = max(sorted(rates), key=lambda rate: search_score(results[search[rate]]))
            further = _beyond(rates, best, METHODS[method].rates)
            if further is None:
                return [self.run(task, method, seed, best) for seed in self.seeds]
            rates.append(further)


def search_score(record: Record) -> float:
    """Return the score by which a learning rate is chosen, higher is better; what is no number is the worst."""
    score = record["search_score"]
    return -math.inf if score is None or math.isnan(score) else score


def _beyond(rates: Sequence[float], best: float, first: Sequence[float]) -> float | None:
    """Return the rate that the search goes on with where the best one lies at the edge, or None."""
    if len(first) == 1:
        return None
    if best == min(rates) and best > first[0] / FACTOR**EXTENSIONS * 1.1:
        return rounded(best / FACTOR)
    if best == max(rates) and best < first[-1] * FACTOR**EXTENSIONS / 1.1:
        return rounded(best * FACTOR)
    return None
