"""Selection of runs that belong together, and of the learning rate at which a method is looked at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.json_files import Record
from experiments.results import read_results
from peft_sparsegrad.cli.errors import InputError

from .runs import SHARED_FIELDS, Run

Results = dict[Run, Record]

RULE = (
    "Each method is at its best learning rate: the least mean dev loss over the seeds that all its rates have in "
    "common, where rates with one seed do not count beside rates with more; the figures are over all its seeds"
)


@dataclass(frozen=True)
class Series:
    """All runs of a method, with its settings, on a task.

    Attributes:
        task: Name in `TASKS`.
        label: The method and its settings.
        rates: For each learning rate, ascending, the records by seed, ascending.
        best: The best learning rate, as `RULE` says.
    """

    task: str
    label: str
    rates: dict[float, dict[int, Record]]
    best: float

    @property
    def records(self) -> dict[int, Record]:
        """The records at the best learning rate, by seed."""
        return self.rates[self.best]


def load(paths: Sequence[Path]) -> list[Results]:
    """The results in the files, apart where more than task, method, settings, seed and learning rate differ.

    A run that is in several files counts once. Raises InputError if a file cannot be read or none has a result.
    """
    results: Results = {}
    for path in paths:
        results.update(read_results(path, Run))
    if not results:
        raise InputError(f"there is no result in {', '.join(map(str, paths))}")
    return group_by(results, lambda run: tuple(getattr(run, name) for name in SHARED_FIELDS))


def series_of(results: Results) -> list[Series]:
    """The series of results that belong together, by task and name."""
    found = []
    for group in group_by(results, lambda run: (run.task, run.label)):
        run = next(iter(group))
        rates = {
            next(iter(same)).lr: {run.seed: same[run] for run in sorted(same, key=lambda run: run.seed)}
            for same in group_by(group, lambda run: run.lr)
        }
        found.append(Series(run.task, run.label, rates, best_rate(rates)))
    return found


def best_rate(rates: dict[float, dict[int, Record]]) -> float:
    """The learning rate that `RULE` chooses; where rates have no seed in common, it is one with the most seeds."""
    most = max(map(len, rates.values()))
    tried = {lr: records for lr, records in rates.items() if len(records) >= min(2, most)}
    shared = set.intersection(*(set(records) for records in tried.values()))
    if not shared:
        tried = {lr: records for lr, records in tried.items() if len(records) == most}
    losses = {lr: [final(records[seed], "loss") for seed in shared or records] for lr, records in tried.items()}
    return min(losses, key=lambda lr: _worst_if_nan(statistics.fmean(losses[lr])))


def _worst_if_nan(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def final(record: Record, score: str) -> float:
    """A score at the end of training."""
    return record["evaluations"][-1][score]


def group_by(results: Results, key: Callable[[Run], Any]) -> list[Results]:
    """The results whose runs have the same key, by ascending key."""
    groups: dict[Any, Results] = {}
    for run, record in results.items():
        groups.setdefault(key(run), {})[run] = record
    return [groups[each] for each in sorted(groups)]
