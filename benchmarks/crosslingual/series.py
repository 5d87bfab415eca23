"""Results that belong together: all runs of a method on a task, and its best learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from examples.xglue.features import ENGLISH_DEV
from examples.xglue.runs import Run
from examples.xglue.tasks import TASKS
from experiments.json_files import Record
from experiments.results import read_results
from peft_sparsegrad.cli.errors import InputError

Results = dict[Run, Record]
VARIED = ("method", "seed", "lr", "dropout")

LOW_RESOURCE = ("hi", "sw", "tr", "ur")
"""Languages with comparatively little text in the data of multilingual encoders: a choice of ours, not the paper's."""


@dataclass(frozen=True)
class Series:
    """All runs of a method on a task.

    Attributes:
        task: Name in `TASKS`.
        label: The method, with the rate of the model's own dropout where there is any.
        languages: Those that are scored.
        rates: For each learning rate, ascending, the records by seed, ascending.
        best: The learning rate with the best score on the English dev set, on average over the seeds that all rates
            have in common; the least of those that are level.
    """

    task: str
    label: str
    languages: tuple[str, ...]
    rates: dict[float, dict[int, Record]]
    best: float

    def means(self, languages: Sequence[str]) -> dict[int, float]:
        """Return the score at the best rate by seed, the mean over the languages."""
        records = self.rates[self.best].items()
        return {
            seed: statistics.fmean(score(record, self.task, each) for each in languages) for seed, record in records
        }

    @property
    def low_resource(self) -> tuple[str, ...]:
        """The languages among `LOW_RESOURCE`."""
        return tuple(language for language in self.languages if language in LOW_RESOURCE)


def score(record: Record, task: str, language: str) -> float:
    """Return the task's metric in percent, in a language or on `ENGLISH_DEV`, at the end of training."""
    return record["epochs"][-1]["scores"][language][TASKS[task].metric]


def label_of(run: Run) -> str:
    """Return the name of the method in tables."""
    return f"{run.method}, dropout {run.dropout:g}" if run.dropout else run.method


def best_rate(rates: dict[float, dict[int, Record]], task: str) -> float:
    """Return the best of the rates, see `Series`; without a seed in common, of those with the most seeds."""
    most = max(map(len, rates.values()))
    shared = set.intersection(*map(set, rates.values()))
    tried = {lr: [records[seed] for seed in shared] for lr, records in rates.items()}
    if not shared:
        tried = {lr: list(records.values()) for lr, records in rates.items() if len(records) == most}
    dev = {lr: statistics.fmean(score(each, task, ENGLISH_DEV) for each in records) for lr, records in tried.items()}
    return min(dev, key=lambda lr: (-dev[lr], lr))


def series_of(results: Results) -> list[Series]:
    """Return the series of the results, those of a task together, in the order in which the results name them."""
    grouped: dict[tuple[str, str], dict[float, dict[int, Record]]] = {}
    languages = {}
    for run in sorted(results, key=lambda run: (run.lr, run.seed)):
        rates = grouped.setdefault((run.task, label_of(run)), {})
        rates.setdefault(run.lr, {})[run.seed] = results[run]
        languages[run.task] = run.languages
    order = list(dict.fromkeys((run.task, label_of(run)) for run in results))
    return [
        Series(task, label, languages[task], grouped[task, label], best_rate(grouped[task, label], task))
        for task, label in sorted(order, key=lambda key: (list(TASKS).index(key[0]), order.index(key)))
    ]


def load(paths: Sequence[Path]) -> Results:
    """Return the results in the files; a run that is in several counts once.

    Raises:
        InputError: If a file cannot be read, none has a result, or some cannot be compared.
    """
    results: Results = {}
    for path in paths:
        results.update(read_results(path, Run))
    if not results:
        raise InputError(f"there is no result in {', '.join(map(str, paths))}")
    check_alike(list(results))
    return results


def check_alike(runs: Sequence[Run]) -> None:
    """Raise an InputError if runs of one task differ in more than `VARIED`."""
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.task, run)
        names = [field.name for field in fields(Run) if field.name not in VARIED]
        if different := [name for name in names if getattr(run, name) != getattr(other, name)]:
            raise InputError(f"{run} and {other} cannot be compared: they differ in {', '.join(different)}")
