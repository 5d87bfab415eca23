"""Rows of the tables: what the seeds of a method have in common, task by task."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.json_files import Record

from .runs import Run

SEARCHED_FIELDS = ("lr", "adapter_lr", "batch_size")
ROW_FIELDS = ("method", "settings", "num_values", "density")
Results = dict[Run, Record]


class RowKey(NamedTuple):
    """Key of a row of a table."""

    method: str
    settings: str
    num_values: int | None
    density: float


@dataclass(frozen=True)
class Cell:
    """Runs of one task that differ by their seed alone."""

    runs: tuple[Run, ...]
    records: tuple[Record, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(record["score"] for record in self.records)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation; None for one seed."""
        if len(self.records) < 2:
            return None
        return statistics.stdev(record["score"] for record in self.records)

    def cost(self, name: str) -> float | None:
        """Mean of what the runs have measured under that name; None where one has not."""
        costs = [(record.get("costs") or {}).get(name) for record in self.records]
        measured = [cost for cost in costs if cost is not None]
        return statistics.fmean(measured) if len(measured) == len(costs) else None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Row:
    """One method with one density: a cell for each task that was run."""

    key: RowKey
    cells: dict[str, Cell]

    @property
    def _trainable(self) -> dict[str, int]:
        return next(iter(self.cells.values())).records[0]["trainable"]

    @property
    def share(self) -> float:
        """Share of a target layer's entries that trains."""
        if self.key.num_values is None:
            return self.key.density
        return self.key.num_values / self._trainable["layer_entries"]

    @property
    def trained(self) -> list[str]:
        """Trained parameters of the model, of an MLP layer, and those of it that a step moves."""
        return [millions(self._trainable[name]) for name in ("model", "layer", "layer_in_step")]

    @property
    def label(self) -> str:
        """The method and its settings."""
        return next(iter(self.cells.values())).runs[0].label

    @property
    def seeds(self) -> str:
        counts = {len(cell.runs) for cell in self.cells.values()}
        return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"

    def average(self, tasks: Sequence[str]) -> str:
        """Mean of the tasks' means; a dash where a task is missing."""
        if not set(tasks) <= self.cells.keys():
            return "–"
        return f"{100 * statistics.fmean(self.cells[task].mean for task in tasks):.1f}"

    def scores(self, tasks: Sequence[str]) -> list[str]:
        return [self.average(tasks), *self.each(tasks, str)]

    def each(self, tasks: Sequence[str], describe: Callable[[Cell], str]) -> list[str]:
        return [describe(self.cells[task]) if task in self.cells else "–" for task in tasks]


def millions(count: int) -> str:
    return f"{count / 1e6:.3g} mln" if count >= 1e6 else f"{count / 1e6:.2g} mln"


def best_cell(results: Results) -> Cell:
    """Of runs of one task and row, those with the learning rate and batch size that did best."""
    groups = group_by(results, SEARCHED_FIELDS).values()
    cells = [Cell(tuple(group), tuple(group.values())) for group in groups]
    return max(cells, key=lambda cell: (len(cell.runs), cell.mean))


def make_rows(results: Results) -> list[Row]:
    """The rows of runs that have all other settings in common, in the order of the file."""
    return [
        Row(RowKey(*key), {task: best_cell(group) for (task,), group in group_by(of_row, ("task",)).items()})
        for key, of_row in group_by(results, ROW_FIELDS).items()
    ]


def group_by(results: Results, names: Iterable[str]) -> dict[tuple[Any, ...], Results]:
    """The results by the values of these fields."""
    names, groups = list(names), {}
    for run, record in results.items():
        groups.setdefault(tuple(getattr(run, name) for name in names), {})[run] = record
    return groups
