"""Which runs there are, and which one is next: decided from the results that there are."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from examples.xglue.runs import Run
from experiments.json_files import Record

from .series import Results, best_rate


@dataclass(frozen=True)
class Plan:
    """A search for each method's learning rate, and more seeds at the best one.

    Attributes:
        tasks: Names in `TASKS`.
        methods: Names in `METHODS`, the one whose results are wanted first at the front.
        rates: Peak learning rates to search.
        seeds: How many there are, from 0 on.
        search_seeds: How many of them, the first, the search has; it goes by the English dev set.
        common: The other settings of a run, by task.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    search_seeds: int
    common: dict[str, dict[str, Any]]

    def next_run(self, results: Results, others: Collection[Run]) -> Run | None:
        """Return the first run that is neither done nor among the `others`; None if there is none at the moment."""
        wanted = (run for pair in itertools.product(self.methods, self.tasks) for run in self._wanted(*pair, results))
        return next((run for run in wanted if run not in results and run not in others), None)

    def search(self, method: str, task: str) -> list[Run]:
        """Return the runs that the best learning rate is found with."""
        pairs = itertools.product(range(self.search_seeds), self.rates)
        return [self._run(method, task, lr, seed) for seed, lr in pairs]

    def _wanted(self, method: str, task: str, results: Results) -> Iterator[Run]:
        """The runs of a method on a task; those after the search are known only when it is done."""
        search = self.search(method, task)
        yield from search
        if all(run in results for run in search):
            rates: dict[float, dict[int, Record]] = {}
            for run in search:
                rates.setdefault(run.lr, {})[run.seed] = results[run]
            best = best_rate(rates, task)
            yield from (self._run(method, task, best, seed) for seed in range(self.search_seeds, self.seeds))

    def _run(self, method: str, task: str, lr: float, seed: int) -> Run:
        return Run(task=task, method=method, lr=lr, seed=seed, **self.common[task])

    @property
    def longest(self) -> int:
        """How many runs there are when all are done."""
        each = self.search_seeds * len(self.rates) + max(0, self.seeds - self.search_seeds)
        return each * len(self.tasks) * len(self.methods)
