"""Checks before the first run: files, the encoder, methods that do not fit it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from experiments.attachment import masks_gradients
from experiments.loading import load_pretrained
from experiments.methods import targeted
from peft_sparsegrad import GradDrop
from peft_sparsegrad.cli.errors import InputError

from .encoder import attach, load_config, load_tokenizer
from .files import read_examples
from .kinds import KINDS
from .runs import Run
from .tasks import TASKS, Split


def check_input(runs: list[Run]) -> None:
    """Look once at everything that the runs need, which differ in task, method and seed alone.

    Raises:
        InputError: If a file or the encoder cannot be used, or a method does not fit it or needs other epochs.
    """
    for run in runs[:1]:
        check_length(run)
    for run in {run.task: run for run in runs}.values():
        check_files(run)
    for run in {(run.method, TASKS[run.task].kind): run for run in runs}.values():
        check_method(run)


def check_length(run: Run) -> None:
    """Raise an InputError if the run's rows are too long for the encoder."""
    positions = getattr(load_pretrained(AutoConfig, run.model), "max_position_embeddings", None)
    limit = min(load_tokenizer(run.model).model_max_length, positions or run.max_length)
    if run.max_length > limit:
        raise InputError(f"{run.model} takes at most {limit} tokens, and --max-length is {run.max_length}")


def check_files(run: Run) -> None:
    """Raise an InputError if a file of the run is not there or malformed."""
    files: list[tuple[Split, str]] = [("train", "en"), ("dev", "en"), *((run.split, each) for each in run.languages)]
    for split, language in files:
        read_examples(Path(run.data), TASKS[run.task], split, language)


def check_method(run: Run) -> None:
    """Raise an InputError if the method does not fit the encoder, or GradDrop's sets of layers the epochs."""
    try:
        with torch.device("meta"):  # no weights are needed
            model = KINDS[TASKS[run.task].kind].auto_class.from_config(load_config(run))
        if run.target_modules or not masks_gradients(run.method):
            targeted(model, list(run.target_modules) or None)
        if masks_gradients(run.method):
            GradDrop(attach(run, model), num_epochs=run.epochs).remove()
    except ValueError as error:
        raise InputError(f"{run.method} on {run.model}: {str(error).splitlines()[0]}") from error
