"""Command line of the comparison: trains, writes one JSON line per run, prints tables, draws figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.results import append_result, finished_runs
from experiments.terminal import run_and_exit
from peft_sparsegrad.cli.errors import InputError

from .arguments import add_run_options
from .checks import check_input
from .plot import plot
from .runs import SHARED_FIELDS, Run, product
from .table import tables
from .train import execute


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Methods on one real model.")
    commands = parser.add_subparsers(required=True, metavar="{run,table,plot,report}")
    run = commands.add_parser("run", help="do the runs that are not in the results file yet")
    run.set_defaults(command=run_all)
    add_run_options(run.add_argument)
    table = commands.add_parser("table", help="print Markdown tables of results")
    table.set_defaults(command=print_tables)
    figures = commands.add_parser("plot", help="write a figure for each task, as PNG and SVG")
    figures.set_defaults(command=write_plots)
    report = commands.add_parser("report", help="write the tables and the figures")
    report.set_defaults(command=write_report)
    for command in (table, report):
        command.add_argument("--against", metavar="METHOD", help="add the differences to it, named as in the tables")
    for command in (figures, report):
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write to")
    for command in (table, figures, report):
        command.add_argument("results", type=Path, nargs="+", metavar="FILE", help="file that `run` wrote")
    return parser.parse_args(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Do what is not done, one line in the results file for each run."""
    runs = runs_of(arguments)
    check_input(arguments, runs)
    finished = finished_runs(arguments.out, Run)
    pending = [run for run in runs if run not in finished]
    print(f"{len(pending)} of {len(runs)} runs to do, into {arguments.out}", flush=True)
    for number, run in enumerate(pending, start=1):
        measured = execute(run, arguments.data)
        append_result(arguments.out, run, measured)
        last, seconds = measured["evaluations"][-1], measured["seconds_per_step"]
        scores = f"metric {last['metric']:.4f}, dev loss {last['loss']:.4f}, {seconds:.3f} s per step"
        print(f"[{number}/{len(pending)}] {run}: {scores}", flush=True)


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """The shard's runs. Finished ones count too: each shard keeps the same runs when it is started again."""
    varied = (arguments.tasks, arguments.methods, arguments.settings, arguments.seeds, arguments.lrs)
    index, count = arguments.shard
    return product(*varied, **{name: getattr(arguments, name) for name in SHARED_FIELDS})[index::count]


def print_tables(arguments: argparse.Namespace) -> None:
    print(tables(arguments.results, arguments.against))


def write_plots(arguments: argparse.Namespace) -> None:
    for path in plot(arguments.results, arguments.out):
        print(path)


def write_report(arguments: argparse.Namespace) -> None:
    """`tables.md` and the figures."""
    text = tables(arguments.results, arguments.against)
    write_plots(arguments)
    path = arguments.out / "tables.md"
    path.write_text(f"{text}\n", encoding="utf-8")
    print(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2, with one line on stderr, where the input cannot be used."""
    parsed = parse_arguments(arguments)
    try:
        parsed.command(parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_and_exit(main)
