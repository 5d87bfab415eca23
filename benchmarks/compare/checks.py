"""Checks that say before the first run what would stop a later one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from peft_sparsegrad.cli.errors import InputError

from .runs import Run
from .tasks import TASKS
from .train import build_model


def check_input(arguments: argparse.Namespace, runs: Iterable[Run]) -> None:
    """Raises InputError, in a sentence, for a model, data, options or settings that cannot be used."""
    if not Path(arguments.model, "config.json").is_file():
        raise InputError(f"{arguments.model} is no folder of a model: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    for name in arguments.tasks:
        task = TASKS[name]
        if arguments.head_steps and not task.has_head:
            raise InputError(f"{name} has no task head to train first: leave --head-steps at 0")
        task.check_model(arguments.model)
        task.divide(arguments.data, tokenizer, arguments.train_rows, seed=0)
        task.dev(arguments.data, tokenizer, arguments.max_eval_rows)
    for run in {(run.task, run.method, run.settings): run for run in runs}.values():
        if run.evals > run.steps:
            raise InputError(f"there are {run.steps} steps, and --evals asks for {run.evals} evaluations")
        if run.overrides:
            _check_settings(run, arguments.data)


def _check_settings(run: Run, data: Path) -> None:
    """Attach the method once: what it takes is known to nobody else."""
    try:
        build_model(replace(run, head_steps=0), data)
    except (TypeError, ValueError) as error:
        raise InputError(f"{run.method} cannot be given --settings '{run.settings}': {error}") from error
