"""One run: train in English, then score all languages once."""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from examples.xglue.encoder import build_model, load_tokenizer
from examples.xglue.features import load_features
from examples.xglue.runs import Run
from examples.xglue.training import bare_trainer, score_sets
from experiments.attachment import count_trainable
from experiments.environment import describe_environment
from experiments.json_files import Record
from experiments.loading import DEVICE

_tokenizer = cache(load_tokenizer)
_features = cache(load_features)  # those of all tasks, for as long as the process lives


def execute(run: Run) -> Record:
    """Do the run.

    Returns:
        `epochs` with the scores after the last one, {language: {metric: percent}}; the seconds of training and of the
        whole run, how many values were trained, and where.

    Raises:
        InputError: If the encoder or the files cannot be used.
    """
    started = time.perf_counter()
    tokenizer = _tokenizer(run.model)
    settings = (run.model, run.data, run.task, run.split, run.languages, run.max_length, run.max_rows or None)
    rows, sets = _features(*settings)
    model = build_model(run)
    with tempfile.TemporaryDirectory() as folder:
        trainer = bare_trainer(run, model, tokenizer, rows, Path(folder))
        training = trainer.train().metrics["train_runtime"]
        scores = score_sets(trainer, sets)
    return {
        "epochs": [{"epoch": run.epochs, "step": trainer.state.global_step, "scores": scores}],
        "trained_parameters": count_trainable(model),
        "training_seconds": training,
        "seconds": time.perf_counter() - started,
        "environment": describe_environment(torch.device(DEVICE)),
    }
