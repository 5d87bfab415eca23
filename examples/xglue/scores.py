"""The scores in results files: by task, method, seed, epoch and language."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.methods import METHODS
from experiments.results import read_results
from peft_sparsegrad.cli.errors import InputError

from .features import ENGLISH_DEV
from .runs import Run
from .tasks import TASKS, Task

EpochRule = Literal["last", "best-dev"]
Scores = dict[str, dict[str, float]]  # of a language, of a metric
SHARED = ("model", "split", "languages", "epochs", "batch_size", "max_length", "max_rows", "embeddings", "precision")
OF_METHOD = ("lr", "dropout", "blocks_per_epoch", "density", "target_modules")


@dataclass
class TaskResults:
    """The results of a task.

    Attributes:
        runs: Those in the results files.
        epochs: The scores after each epoch, by method and seed. The methods are in the order of `METHODS`, but the
            baseline comes first.
    """

    task: Task
    runs: list[Run] = field(default_factory=list)
    epochs: dict[str, dict[int, list[Scores]]] = field(default_factory=dict)

    @property
    def languages(self) -> tuple[str, ...]:
        return self.runs[0].languages

    def at(self, method: str, rule: EpochRule) -> dict[int, Scores]:
        """The scores of each seed, after the epoch that the rule chooses."""
        return {seed: choose_epoch(epochs, rule, self.task.metric) for seed, epochs in self.epochs[method].items()}

    def of_languages(self, method: str, rule: EpochRule) -> dict[int, dict[str, float]]:
        """For each seed the task's metric in each language."""
        metric, languages = self.task.metric, self.languages
        return {s: {lang: scores[lang][metric] for lang in languages} for s, scores in self.at(method, rule).items()}

    def average(self, method: str, rule: EpochRule, metric: str | None = None) -> dict[int, float]:
        """For each seed a metric, the task's by default, averaged over the languages."""
        return {
            seed: statistics.fmean(scores[language][metric or self.task.metric] for language in self.languages)
            for seed, scores in self.at(method, rule).items()
        }


def choose_epoch(epochs: Sequence[Scores], rule: EpochRule, metric: str) -> Scores:
    """The scores after the last epoch, or after the first of those that are best on the English dev set."""
    if rule == "last":
        return epochs[-1]
    return max(epochs, key=lambda scores: scores[ENGLISH_DEV][metric])


def load_results(paths: Iterable[Path], baseline: str) -> dict[str, TaskResults]:
    """The results of each task, in the order of `TASKS`.

    Raises:
        InputError: If a file cannot be read, or there is no result, none of the baseline, or some that cannot be
            compared.
    """
    by_task: dict[str, TaskResults] = {}
    for path in paths:
        for run, record in read_results(path, Run).items():
            _add(by_task.setdefault(run.task, TaskResults(TASKS[run.task])), run, record)
    if not by_task:
        raise InputError(f"there is no finished run in {', '.join(map(str, paths))}")
    for results in by_task.values():
        if baseline not in results.epochs:
            raise InputError(f"{results.task.name} has no result of the baseline {baseline!r}, see --baseline")
        results.epochs = {name: results.epochs[name] for name in ordered(results.epochs, baseline)}
    return {name: by_task[name] for name in TASKS if name in by_task}


def _add(results: TaskResults, run: Run, record: dict[str, Any]) -> None:
    seeds = results.epochs.setdefault(run.method, {})
    for other in results.runs:
        names = (*SHARED, *OF_METHOD) if other.method == run.method else SHARED
        if different := [name for name in names if getattr(run, name) != getattr(other, name)]:
            raise InputError(f"{run} and {other} cannot be compared: they differ in {', '.join(different)}")
    if run.seed in seeds:
        raise InputError(f"there are two results of {run}")
    results.runs.append(run)
    seeds[run.seed] = [epoch["scores"] for epoch in record["epochs"]]


def ordered(methods: Iterable[str], baseline: str) -> list[str]:
    """The methods in the order of the registry, the baseline before all others."""
    return sorted(methods, key=lambda name: (name != baseline, list(METHODS).index(name)))


def methods_of(results: dict[str, TaskResults], baseline: str) -> list[str]:
    """All methods that have a result of a task."""
    return ordered({method for each in results.values() for method in each.epochs}, baseline)
