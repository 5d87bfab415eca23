"""Results as series: each method at its best learning rate, over seeds, with its costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.compare.difference import interval
from experiments.json_files import Record
from experiments.results import read_json_lines, read_results
from peft_sparsegrad.cli.errors import InputError

from .methods import METHODS, Method
from .runs import Run, search_score

Results = dict[Run, Record]


@dataclass(frozen=True)
class Series:
    """All runs of a method on a task.

    Attributes:
        method: Name in the table of methods, which may have changed since.
        searched: The first seed's records by learning rate, ascending.
        lr: The best of these rates, by the score on the search's rows.
        records: The records at that rate, by seed.
        costs: The method's line of `costs`; empty where it was not measured.
    """

    method: str
    searched: dict[float, Record]
    lr: float
    records: dict[int, Record]
    costs: Record = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The family whose members a figure joins; a method that the table lost is one by itself."""
        known: Method | None = METHODS.get(self.method)
        return known.family if known else self.method

    @property
    def scores(self) -> list[float]:
        return [record["score"] for record in self.records.values()]

    @property
    def at_edge(self) -> bool:
        """Return whether the best rate is the least or the greatest that was tried."""
        return len(self.searched) > 1 and self.lr in (min(self.searched), max(self.searched))

    @property
    def not_searched(self) -> bool:
        """Return whether the method trains, at the one rate that was tried."""
        return len(self.searched) == 1 and self.lr > 0

    def mean(self, value: Callable[[Record], float]) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(value(record) for record in self.records.values())


def load(results: Sequence[Path], costs: Sequence[Path]) -> dict[str, list[Series]]:
    """Return the series of each task, in the order of the table of methods.

    Raises:
        InputError: If a file cannot be read or there is no result, or results of a task differ in more than method,
            seed and learning rate.
    """
    found: Results = {}
    for path in results:
        found.update(read_results(path, Run))
    if not found:
        raise InputError(f"there is no result in {', '.join(map(str, results))}")
    lines = [line for path in costs for line in read_json_lines(path)]
    tasks = sorted({run.task for run in found})
    return {task: _series({run: found[run] for run in found if run.task == task}, lines) for task in tasks}


def _series(results: Results, costs: list[Record]) -> list[Series]:
    settings = {(run.model, run.steps, run.batch_size, run.precision) for run in results}
    if len(settings) > 1:
        raise InputError(f"the results of a task are of several settings, {sorted(settings)}: give them apart")
    order = [*METHODS, *sorted({run.method for run in results}.difference(METHODS))]
    one = next(iter(results))
    of_task = {line["method"]: line for line in costs if (line["model"], line["task"]) == (one.model, one.task)}
    return [
        _one(method, {run: results[run] for run in results if run.method == method}, of_task.get(method, {}))
        for method in order
        if any(run.method == method for run in results)
    ]


def _one(method: str, results: Results, costs: Record) -> Series:
    first = min(run.seed for run in results)
    searched = {run.lr: record for run, record in results.items() if run.seed == first}
    searched = dict(sorted(searched.items()))
    best = max(searched, key=lambda lr: search_score(searched[lr]))
    records = {run.seed: record for run, record in results.items() if run.lr == best}
    return Series(method, searched, best, dict(sorted(records.items())), costs)


def half_width(values: Sequence[float]) -> float | None:
    """Return half of the 95% interval of Student's t for the mean, None for a single value."""
    if len(values) < 2:
        return None
    low, high = interval(values)
    return (high - low) / 2


def best_lora(series: list[Series], higher_is_better: bool) -> Series | None:
    """Return the LoRA of any rank and place with the best mean final score among those with the most seeds."""
    loras = [each for each in series if each.family.split(",")[0] == "LoRA"]
    most = max((len(each.records) for each in loras), default=0)
    sign = 1 if higher_is_better else -1
    full = [each for each in loras if len(each.records) == most]
    return max(full, key=lambda each: sign * statistics.fmean(each.scores), default=None)
