"""Command line of the comparison: trains, writes one JSON line per run, prints tables."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from peft_sparsegrad.methods import METHODS

from .errors import InputError
from .runs import Run, append, done, product
from .table import tables
from .tasks import TASKS
from .train import execute


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Methods on one real model.")
    commands = parser.add_subparsers(required=True, metavar="{run,table}")
    run = commands.add_parser("run", help="do the runs that are not in the results file yet")
    run.set_defaults(command=run_all)
    add_run_options(run.add_argument)
    table = commands.add_parser("table", help="print Markdown tables of results")
    table.set_defaults(command=print_tables)
    table.add_argument("--against", choices=METHODS, metavar="METHOD", help="add the differences to this method")
    table.add_argument("results", type=Path, nargs="+", help="files that `run` wrote")
    return parser.parse_args(arguments)


def add_run_options(add: Callable[..., Any]) -> None:
    add("--model", required=True, help="folder of a BERT-like checkpoint and its tokenizer")
    add("--data", type=Path, required=True, help="folder with cola/cola_train.tsv, stsb/stsb_train.csv, ..._dev")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="default: %(default)s")
    add("--methods", nargs="+", choices=METHODS, required=True, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="default: %(default)s")
    add("--lrs", nargs="+", type=positive(float), required=True, metavar="LR", help="peak learning rates")
    add("--density", type=positive(float), default=0.01, help="trained share of each weight (default: %(default)s)")
    add("--epochs", type=positive(int), default=3, help="default: %(default)s")
    add("--train-rows", type=positive(int), default=1600, help="rows to train on (default: %(default)s)")
    add("--batch-size", type=positive(int), default=16, help="default: %(default)s")
    add("--out", type=Path, default=Path("outputs/compare.jsonl"), help="results file (default: %(default)s)")
    add(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="every N-th run, from the I-th; needs its own --out"
    )


def positive(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse: what `convert` makes of the text, if it is above 0."""

    def parse(text: str) -> Any:
        number = convert(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return number

    return parse


def shard(text: str) -> tuple[int, int]:
    """A type for argparse: `0/2` as (0, 2)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be like 0/2 or 1/2, not {text}")
    return int(index), int(count)


def run_all(arguments: argparse.Namespace) -> None:
    """Do what is not done, one line in the results file for each run."""
    check_input(arguments)
    runs = runs_of(arguments)
    finished = done(arguments.out)
    pending = [run for run in runs if run not in finished]
    print(f"{len(pending)} of {len(runs)} runs to do, into {arguments.out}", flush=True)
    for number, run in enumerate(pending, start=1):
        measured = execute(run, arguments.data)
        append(arguments.out, run, measured)
        last, seconds = measured["epochs"][-1], measured["seconds_per_step"]
        scores = f"metric {last['metric']:.4f}, dev loss {last['loss']:.4f}, {seconds:.3f} s per step"
        print(f"[{number}/{len(pending)}] {run}: {scores}", flush=True)


def check_input(arguments: argparse.Namespace) -> None:
    """Raises InputError before the first run for what would stop a later one."""
    if not Path(arguments.model, "config.json").is_file():
        raise InputError(f"{arguments.model} is no folder of a model: it has no config.json")
    for name in arguments.tasks:
        TASKS[name].sample(arguments.data, arguments.train_rows, seed=0)
        TASKS[name].load(arguments.data, "dev")


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """The shard's runs. Finished ones count too: each shard keeps the same runs when it is started again."""
    names = ("model", "density", "epochs", "train_rows", "batch_size")
    settings = {name: getattr(arguments, name) for name in names}
    index, count = arguments.shard
    return product(arguments.tasks, arguments.methods, arguments.seeds, arguments.lrs, **settings)[index::count]


def print_tables(arguments: argparse.Namespace) -> None:
    print(tables(arguments.results, arguments.against))


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
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    sys.exit(main())
