"""Command line: trains in English, scores other languages, writes one JSON line per run, prints tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.xglue.checks import check_input
from examples.xglue.runs import FINE_TUNING
from experiments.terminal import run_and_exit
from experiments.text_files import make_folder

from .arguments import add_run_options, plan_of
from .figure import draw
from .series import load
from .table import tables
from .workers import carry_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a run failed."""
    parsed = parse_arguments(arguments)
    return parsed.command(parsed)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crosslingual",
        description="Trained in English, scored in other languages.",
    )
    commands = parser.add_subparsers(required=True, metavar="{run,table}")
    run = commands.add_parser("run", help="do the runs that are not in the results file yet")
    run.set_defaults(command=run_all)
    add_run_options(run.add_argument)
    table = commands.add_parser("table", help="print Markdown tables of results")
    table.set_defaults(command=print_tables)
    table.add_argument("results", type=Path, nargs="+", metavar="FILE", help="file that `run` wrote")
    table.add_argument("--against", default=FINE_TUNING, metavar="METHOD", help="compare with it (%(default)s)")
    table.add_argument("--figure", type=Path, metavar="FILE", help="write a picture of the differences, .png or .svg")
    return parser.parse_args(arguments)


def run_all(arguments: argparse.Namespace) -> int:
    """Do what is not done, until the time is over."""
    plan = plan_of(arguments)
    check_input([plan.search(method, task)[0] for method in plan.methods for task in plan.tasks])
    make_folder(arguments.out.parent)
    return 0 if carry_out(plan, arguments.out, arguments.workers, arguments.minutes) else 1


def print_tables(arguments: argparse.Namespace) -> int:
    """Print the tables, and draw the figure if one is wanted."""
    results = load(arguments.results)
    print(tables(results, arguments.against))
    if arguments.figure:
        draw(results, arguments.against, arguments.figure)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
