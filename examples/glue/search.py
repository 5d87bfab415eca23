"""Search learning rate and batch size of every task and method with Optuna, in the SparseGrad paper's ranges.

    python -m examples.glue.search --model google-bert/bert-base-uncased --tasks rte --methods sparsegrad --trials 20

The rate is drawn from 1e-6 to 1e-1, the batch size from 8, 16 and 32 (section 5.1), by the tree-structured Parzen
estimator; the logarithmic scale of the rate is ours. Every trial is in OUT/search.db. The best values come into
OUT/hyperparameters.json, which `examples.glue.train --hyperparameters` takes. Started again with the same options, it
goes on where it was killed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from experiments.arguments import positive_int
from experiments.terminal import heading, run_and_exit, show
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
from .hyperparameters import add_found
from .runs import Run

DATABASE = "search.db"
FOUND = "hyperparameters.json"
LR_RANGE = (1e-6, 1e-1)
BATCH_SIZES = (8, 16, 32)
FAILED_SCORE = -1.0  # of a trial whose training has failed: no metric is lower


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    templates = list_templates(args)
    finetuner = make_finetuner(args, dict.fromkeys(run.task for run in templates), args.out / "search")
    check_models(templates)
    make_folder(args.out)
    for template in templates:
        heading(f"{template.task}, {template.method}")
        try:
            search(template, finetuner, args.trials, args.out)
        except (SQLAlchemyError, StorageInternalError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise InputError(f"{args.out / DATABASE} cannot be read or written: {reason}") from error
    return 0


def search(template: Run, finetuner: Finetuner, trials: int, out: Path) -> None:
    """Do the template's trials and write down the best."""
    study = open_study(out / DATABASE, template)
    run_study(study, template, finetuner, trials)
    best = best_trial(study)
    settings = {"model": template.model, "task": template.task, "method": template.method, **best.params}
    add_found(out / FOUND, {**settings, "score": best.value, "trials": len(finished_trials(study))})
    show("best", describe(best))


def list_templates(args: argparse.Namespace) -> list[Run]:
    """A run of each task and method, without the values that are searched for."""
    pairs = itertools.product(dict.fromkeys(args.tasks), dict.fromkeys(args.methods))
    common = {"seed": args.seed, "lr": 0.0, "batch_size": 0, **run_settings(args)}
    of_methods = settings_of_methods(args)
    return [
        Run(task=task, method=method, settings=of_methods[method], **capacity(method, args.density), **common)
        for task, method in pairs
    ]


def open_study(database: Path, template: Run) -> optuna.Study:
    """The template's study, with what an earlier process has done of it."""
    storage, name = f"sqlite:///{database}", template.folder_name
    return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


def run_study(study: optuna.Study, template: Run, finetuner: Finetuner, trials: int) -> None:
    """Have so many trials finished, those of earlier processes included."""
    for trial in finished_trials(study):
        finetuner.clean_up(replace(template, **trial.params))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # a killed process has left it; its values are drawn again
    while (count := len(finished_trials(study))) < trials:
        # A sampler of its own for each trial: a process that goes on draws what the killed one would have drawn.
        study.sampler = optuna.samplers.TPESampler(seed=1000 * template.seed + count)
        trial = study.ask()
        run = replace(
            template,
            lr=trial.suggest_float("lr", *LR_RANGE, log=True),
            batch_size=trial.suggest_categorical("batch_size", BATCH_SIZES),
        )
        study.tell(trial, score_of(run, finetuner))
        finetuner.clean_up(run)
        show(f"trial {count + 1} of {trials}", describe(finished_trials(study)[-1]))


def score_of(run: Run, finetuner: Finetuner) -> float:
    try:
        return finetuner.finish(run)["score"]
    except TrainingError as error:
        show("the training failed", str(error))
        return FAILED_SCORE


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,))


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The first of the trials with the highest score."""
    return max(finished_trials(study), key=lambda trial: trial.value or 0.0)


def describe(trial: FrozenTrial) -> str:
    return (
        f"{100 * (trial.value or 0.0):.2f} with lr {trial.params['lr']:.2e}, batch size {trial.params['batch_size']}"
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser)
    add = parser.add_argument
    add("--trials", type=positive_int, default=20, help="trials of each task and method (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the training and of the search (default: %(default)s)")
    add("--out", type=Path, default=Path("outputs/glue"), help="folder for the results (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_and_exit(main)
