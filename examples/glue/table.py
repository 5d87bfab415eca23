"""Tables of results in Markdown: scores, scores by density, batch sizes and learning rates (as in appendices B to D).

    python -m examples.glue.table outputs/glue/results.jsonl

Scores are in percent, mean ± sample standard deviation over seeds. CoLA: Matthews correlation. STSB: mean of Pearson's
and Spearman's correlation. All others: accuracy, on MNLI's matched rows. Where a task was run with several learning
rates or batch sizes, a method shows the one with the best mean, of those with the most seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.json_files import Record
from experiments.results import read_results
from experiments.tables import markdown_table
from experiments.terminal import run_and_exit
from experiments.text_files import make_folder, write_whole
from peft_sparsegrad.cli.errors import InputError

from .runs import Run
from .tasks import TASKS

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


def score_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Tables 4, 5, 9 and 10."""
    header = [
        "method",
        "density",
        "trained, model",
        "trained, MLP layer",
        "in a step",
        "seeds",
        "AVG",
        *_titles(tasks),
    ]
    lines = [[r.label, _percent(r.share), *r.trained, r.seeds, *r.scores(tasks)] for r in rows]
    return markdown_table(header, lines)


def density_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Tables 11 and 12: every row of a method that was run with numbers of values, the largest share last."""
    lines = [
        [row.label, _values(row), _percent(row.share), row.seeds, *row.scores(tasks)]
        for row in sorted(rows, key=lambda row: (row.label, row.share))
    ]
    return markdown_table(["method", "values per layer", "of its entries", "seeds", "AVG", *_titles(tasks)], lines)


def _values(row: Row) -> str:
    return "–" if row.key.num_values is None else f"{row.key.num_values:,}"


def values_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Tables 13 to 15: the batch sizes and learning rates behind the scores."""
    lines = [[row.label, _percent(row.share), *row.each(tasks, _hyperparameters)] for row in rows]
    return markdown_table(["batch size / learning rate", "density", *_titles(tasks)], lines)


def _hyperparameters(cell: Cell) -> str:
    run = cell.runs[0]
    adapter = "" if run.adapter_lr is None else f", adapter {run.adapter_lr:.3g}"
    return f"{run.batch_size} / {run.lr:.3g}{adapter}"


def _titles(tasks: Iterable[str]) -> list[str]:
    return [TASKS[task].title for task in tasks]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def report(results: Results) -> str:
    """All tables, a section for all runs that have the same settings but for what the tables compare."""
    varied = ("task", "seed", *ROW_FIELDS, *SEARCHED_FIELDS)
    shared = [name for name in Run.__dataclass_fields__ if name not in varied]
    groups = group_by(results, shared)
    return "\n\n".join(_section(dict(zip(shared, key, strict=True)), group) for key, group in groups.items()) + "\n"


def _section(settings: dict[str, Any], results: Results) -> str:
    rows = make_rows(results)
    tasks = [task for task in TASKS if any(task in row.cells for row in rows)]
    of_density = {row.key.method for row in rows if row.key.num_values is not None}
    by_share = [row for row in rows if row.key.num_values is None]
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None)
    parts = [f"## {words}"]
    if by_share:
        parts += ["### Scores", score_table(by_share, tasks)]
    if of_density:
        rows_of_density = [row for row in rows if row.key.method in of_density]
        parts += ["### Scores by density", density_table(rows_of_density, tasks)]
    return "\n\n".join([*parts, "### Batch sizes and learning rates", values_table(rows, tasks)])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    results: Results = {}
    for path in args.results:
        results.update(read_results(path, Run))
    if not results:
        raise InputError(f"{args.results[0]} holds no finished run")
    text = report(results)
    if args.out is None:
        sys.stdout.write(text)
    else:
        make_folder(args.out.parent)
        write_whole(args.out, text.encode())
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", type=Path, nargs="+", metavar="FILE", help="results that examples.glue.train has written")
    add("--out", type=Path, metavar="FILE", help="Markdown file to write (default: standard output)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_and_exit(main)
