"""Fine-tune an encoder on English XGLUE tasks, and score it on all of their languages after each epoch.

    python -m examples.xglue.train --data xglue_full_dataset --tasks XNLI POS --seeds 0 1 2

Every method of every task and seed is a run, and each finished one a line of `results.jsonl` in the output folder, of
which `python -m examples.xglue.report` makes tables and figures. Start a killed command again, and it goes on: what is
finished is skipped, and the run that was under way continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from experiments.arguments import non_negative_int, positive_float, positive_int, share
from experiments.methods import METHODS
from experiments.results import append_result, finished_runs
from experiments.terminal import heading, run_and_exit
from experiments.text_files import make_folder
from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.graddrop import VARIANTS

from .checks import check_input
from .runs import FINE_TUNING, Run
from .tasks import TASKS, XGLUE
from .training import execute

DEFAULT_METHODS = [FINE_TUNING, *(name.lower() for name in VARIANTS)]
MIN_LENGTH = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs that are not done. Returns the exit status."""
    args = parse_args(arguments)
    runs, results = runs_of(args), args.out / "results.jsonl"
    finished = finished_runs(results, Run)
    pending = [run for run in runs if run not in finished]
    check_input(pending)
    make_folder(args.out)
    print(f"{len(pending)} of {len(runs)} runs to do, into {results}", flush=True)
    for number, run in enumerate(pending, start=1):
        heading(f"[{number}/{len(pending)}] {run}")
        folder = args.out / "checkpoints" / run.folder_name
        append_result(results, run, execute(run, folder, args.save_steps))
        shutil.rmtree(folder, ignore_errors=True)
    for run in finished.intersection(runs):  # killed before it could do so
        shutil.rmtree(args.out / "checkpoints" / run.folder_name, ignore_errors=True)
    return 0


def runs_of(args: argparse.Namespace) -> list[Run]:
    """One run for each task, seed and method; seed by seed, so that an interrupted task can be compared already."""
    if unknown := set(args.languages or ()).difference(*(TASKS[name].languages for name in args.tasks)):
        raise InputError(f"no task of {', '.join(args.tasks)} has a test set in {', '.join(sorted(unknown))}")
    runs = [
        Run(
            model=args.model,
            data=str(args.data),
            task=task,
            method=method,
            seed=seed,
            split=args.split,
            languages=languages_of(task, args.languages),
            epochs=args.epochs,
            lr=args.lr,
            batch_size=args.batch_size,
            max_length=args.max_length,
            max_rows=args.max_rows,
            dropout=dropout_of(method, args.dropout),
            embeddings=args.embeddings,
            blocks_per_epoch=args.blocks_per_epoch if method.startswith("gradfreeze") else 0,
            density=args.density,
            target_modules=tuple(args.target_modules),
            precision=args.precision,
        )
        for task, seed, method in itertools.product(args.tasks, args.seeds, args.methods)
    ]
    return list(dict.fromkeys(runs))


def dropout_of(method: str, wanted: float | Literal["paper"]) -> float:
    """The rate of the model's own dropout; the paper's is GradDrop's, but 0 with gradient dropout (section IV)."""
    if wanted != "paper":
        return wanted
    drops_gradients = "graddrop" in method and method != FINE_TUNING
    return 0.0 if drops_gradients else float(VARIANTS["GradDrop"]["p"])


def languages_of(task: str, wanted: list[str] | None) -> tuple[str, ...]:
    """The task's languages, of which only the wanted ones if any are named."""
    chosen = tuple(language for language in TASKS[task].languages if wanted is None or language in wanted)
    if not chosen:
        raise InputError(f"{task} has none of the languages {', '.join(wanted or ())}")
    return chosen


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.xglue.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    add_training_options(parser)
    args = parser.parse_args(arguments)
    if args.max_length < MIN_LENGTH:
        parser.error(f"--max-length must be at least {MIN_LENGTH}, to hold a question and a part of its context")
    return args


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the benchmark, with a folder for each task (required)")
    add("--out", type=Path, default=Path("outputs/xglue"), help="folder for results and checkpoints (%(default)s)")
    add("--model", default="FacebookAI/xlm-roberta-large", help="encoder: a folder or a hub id (%(default)s)")
    add(
        "--tasks",
        nargs="+",
        type=str.upper,
        choices=list(TASKS),
        default=list(XGLUE),
        metavar="TASK",
        help=f"of {', '.join(TASKS)} (the {len(XGLUE)} of XGLUE)",
    )
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} ({FINE_TUNING}, which is plain fine-tuning, and all variants of GradDrop)",
    )
    add(
        "--seeds",
        nargs="+",
        type=non_negative_int,
        default=[0],
        help="of the head, the data's order and the masks (0)",
    )
    add("--languages", nargs="+", help="languages to score, of those that each task has (all of them)")
    add("--split", choices=["test", "dev"], default="test", help="what is scored in each language (%(default)s)")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=positive_int, default=10, help="passes over the English training file (%(default)s)")
    add("--lr", type=positive_float, default=1e-5, help="peak learning rate (%(default)s)")
    add("--batch-size", type=positive_int, default=32, help="rows in a batch (%(default)s)")
    add("--max-length", type=positive_int, default=256, help="tokens of a row or of a window (%(default)s)")
    add("--max-rows", type=positive_int, default=0, help="use the first rows of each file only, for a trial (all)")
    add(
        "--dropout",
        type=dropout_rate,
        default=0.0,
        metavar="RATE",
        help="rate of the model's own dropout, or 'paper': 0 with gradient dropout, 0.2 without (%(default)s)",
    )
    add(
        "--embeddings",
        choices=["frozen", "trained"],
        default="frozen",
        help="whether the input embeddings train, with every method in full and unmasked (%(default)s)",
    )
    add(
        "--blocks-per-epoch",
        type=positive_int,
        default=0,
        help="blocks that GradFreeze adds in an epoch (an even part of all)",
    )
    add("--density", type=share, default=0.01, help="share of each weight that LoRA and its like train (%(default)s)")
    add(
        "--target-modules",
        nargs="+",
        default=[],
        help="layers to adapt (GradDrop: the blocks; others: the MLP)",
    )
    add("--precision", choices=["float32", "bf16"], default="float32", help="bf16 is mixed precision (%(default)s)")
    add("--save-steps", type=positive_int, default=500, help="steps between checkpoints in an epoch (%(default)s)")


def dropout_rate(text: str) -> float | Literal["paper"]:
    if text == "paper":
        return "paper"
    rate = float(text)
    if not 0 <= rate < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1) or 'paper', not {text}")
    return rate


if __name__ == "__main__":
    run_and_exit(main)
