"""Tables of results in Markdown: scores, scores by density, batch sizes and learning rates (as in appendices B to D).

    python -m examples.glue.table outputs/glue/results.jsonl

Scores are in percent, mean ± sample standard deviation over seeds. CoLA: Matthews correlation. STSB: mean of Pearson's
and Spearman's correlation. All others: accuracy, on MNLI's matched rows. Where a task was run with several learning
rates or batch sizes, a method shows the one with the best mean, of those with the most seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.results import read_results
from experiments.tables import markdown_table
from experiments.terminal import run_and_exit
from experiments.text_files import make_folder, write_whole
from peft_sparsegrad.cli.errors import InputError

from .cost_tables import memory_table, size_table, speed_table
from .rows import ROW_FIELDS, SEARCHED_FIELDS, Cell, Results, Row, group_by, make_rows
from .runs import Run
from .tasks import TASKS


def score_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Tables 4, 5, 9 and 10."""
    header = ["method", "density", "trained, model", "trained, MLP layer", "in a step", "seeds", "AVG"]
    lines = [[r.label, _percent(r.share), *r.trained, r.seeds, *r.scores(tasks)] for r in rows]
    return markdown_table([*header, *_titles(tasks)], lines)


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
    shared = [field.name for field in fields(Run) if field.name not in varied]
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
    if any(record.get("costs") for record in results.values()):
        parts += ["### Steps per second", speed_table(rows, tasks), "### Peak memory of a step, MB"]
        parts += [memory_table(rows, tasks), "### Sizes, MB", size_table(rows)]
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
