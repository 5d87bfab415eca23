"""Fine-tune an encoder on GLUE tasks: every task, method and seed is a run, and a line of OUT/results.jsonl.

    python -m examples.glue.train --model google-bert/bert-base-uncased --tasks rte --methods full lora sparsegrad

Learning rate and batch size are those of --lr and --batch-size; else of --hyperparameters, what the search has found;
else of the SparseGrad paper, tables 13 to 15. Started again with the same options, it goes on where it was killed.
At the end it prints all tables of the results file, as `python -m examples.glue.table` does.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from experiments.arguments import positive_float, positive_int
from experiments.json_files import Record
from experiments.results import append_result, finished_runs, read_results
from experiments.terminal import heading, run_and_exit, show, show_lines
from experiments.text_files import make_folder
from peft_sparsegrad.cli.errors import InputError

from .arguments import (
    add_shared_arguments,
    capacity,
    check_models,
    make_finetuner,
    run_settings,
    settings_of_methods,
)
from .finetune import Finetuner, TrainingError
from .hyperparameters import PRESETS, Hyperparameters, preset_of, read_found
from .runs import Run
from .table import report

RESULTS = "results.jsonl"
DEFAULT_BATCH_SIZE = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is left to do. Returns the exit status: 1 if the training of a run has failed."""
    args = parse_args(argv)
    results = args.out / RESULTS
    runs = list_runs(args)
    done = finished_runs(results, Run)
    to_do = [run for run in runs if run not in done]
    finetuner = make_finetuner(args, dict.fromkeys(run.task for run in to_do), args.out / "runs")
    finetuner.models = args.out / "models" if args.save_models else None
    check_models(to_do)
    make_folder(args.out)
    heading(f"{len(to_do)} of {len(runs)} runs to do, into {results}")
    for run in done:
        finetuner.clean_up(run)
    finished = [finish(run, finetuner, results) for run in to_do]
    if results.exists():
        show_lines(report(read_results(results, Run)))
    return 0 if all(finished) else 1


def finish(run: Run, finetuner: Finetuner, results: Path) -> bool:
    """Do the run and add its line to the results. Returns whether its training went well."""
    try:
        result = finetuner.finish(run)
    except TrainingError as error:
        show("the training failed", str(error))
        return False
    append_result(results, run, result)
    finetuner.clean_up(run)
    show(f"{in_words(result)} in epoch {result['best_epoch']}", f"{result['seconds']:.0f} s: {run}")
    return True


def in_words(result: Record) -> str:
    """Return the score and, where it is 0 and says nothing of whether the run learned, the loss of that epoch."""
    score = f"{100 * result['score']:.2f}"
    if result["score"]:
        return score
    best = next(entry for entry in result["evaluations"] if round(entry["epoch"]) == result["best_epoch"])
    return f"{score} (the same for all rows, loss {best['loss']:.4f})"


def list_runs(args: argparse.Namespace) -> list[Run]:
    """The runs, seed by seed, so that what a killed command leaves can be compared."""
    settings, of_methods = run_settings(args), settings_of_methods(args)
    found = {} if args.hyperparameters is None else read_found(args.hyperparameters)
    runs = [
        Run(
            task=task,
            method=method,
            seed=seed,
            settings=of_methods[method],
            **capacity(method, args.density, num_values),
            **chosen_hyperparameters(args, found, task, method)._asdict(),
            **settings,
        )
        for seed, task, method, num_values in itertools.product(
            args.seeds, args.tasks, args.methods, args.num_values or [None]
        )
    ]
    return list(dict.fromkeys(runs))


def chosen_hyperparameters(
    args: argparse.Namespace, found: dict[tuple[str, str], Hyperparameters], task: str, method: str
) -> Hyperparameters:
    """Return the hyperparameters of a task and method: those given, else those found, else the preset.

    Raises:
        InputError: If none of them has a learning rate.
    """
    name = preset_of(args.model) if args.preset == "auto" else args.preset
    known = found.get((task, method)) or PRESETS.get(name or "none", {}).get(task)
    if known is None:
        if args.lr is None:
            raise InputError(f"there is no learning rate for {task} with {method} and {args.model}: give --lr")
        known = Hyperparameters(DEFAULT_BATCH_SIZE, args.lr)
    return Hyperparameters(args.batch_size or known.batch_size, args.lr or known.lr)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run for each (default: 0 1 2)")
    add(
        "--num-values",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="trained values of each MLP layer, a run for each, in place of --density (default: none)",
    )
    add("--lr", type=positive_float, help="peak learning rate (default: see above)")
    add("--batch-size", type=positive_int, help=f"rows in a batch (default: see above, and else {DEFAULT_BATCH_SIZE})")
    add("--hyperparameters", type=Path, metavar="FILE", help="what examples.glue.search has written (default: none)")
    add(
        "--preset",
        choices=["auto", *PRESETS, "none"],
        default="auto",
        help="the paper's table of best values; auto goes by the model's name (default: %(default)s)",
    )
    add("--save-models", action="store_true", help="keep the best model of each run in OUT/models (default: no)")
    add("--out", type=Path, default=Path("outputs/glue"), help="folder for the results (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_and_exit(main)
