"""One run: fine-tune on English with transformers' Trainer, score every language after each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from experiments.attachment import count_trainable, make_optimizer, own_callbacks
from experiments.json_files import Record
from experiments.loading import DEVICE
from experiments.terminal import show
from experiments.training import count_steps, rising_steps, training_arguments

from .checkpoints import SaveWithinEpochs, last_complete_checkpoint
from .encoder import build_model, load_tokenizer
from .evaluation_set import EvaluationSet, Features
from .features import load_features
from .kinds import KINDS
from .runs import Run
from .tasks import TASKS


class ScoreLanguages(TrainerCallback):
    """Scores all evaluation sets after each epoch, and keeps the scores in the Trainer's state.

    They are part of the checkpoint that is written next, so that a run that goes on from it has each epoch's scores
    exactly once.
    """

    def __init__(self, sets: dict[str, EvaluationSet], main_metric: str) -> None:
        self.sets, self.main_metric = sets, main_metric
        self.trainer: Trainer | None = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.trainer is not None
        scores = score_sets(self.trainer, self.sets)
        epoch = round(state.epoch or 0)
        state.log_history.append({"epoch": epoch, "step": state.global_step, "scores": scores})  # pyright: ignore
        control.should_save = state.global_step < state.max_steps
        show(f"epoch {epoch}", "  ".join(f"{name} {each[self.main_metric]:.2f}" for name, each in scores.items()))


def score_sets(trainer: Trainer, sets: dict[str, EvaluationSet]) -> dict[str, dict[str, float]]:
    """Return {language: {metric: percent}} of the model as it is."""

    def score(evaluation_set: EvaluationSet) -> dict[str, float]:
        return evaluation_set.score(trainer.predict(evaluation_set.features).predictions)  # pyright: ignore

    return {name: score(each) for name, each in sets.items()}


def execute(run: Run, folder: Path, save_steps: int) -> Record:
    """Do the run, or the rest of it if it was interrupted.

    Args:
        folder: For its checkpoints, which stay there: with them nothing is lost until the result is written.
        save_steps: Steps between checkpoints within an epoch; there is one at the end of each epoch as well.

    Returns:
        `epochs` with the scores of each, {language: {metric: percent}}, and how many parameters were trained.

    Raises:
        InputError: If the encoder or the files cannot be used.
    """
    tokenizer = load_tokenizer(run.model)
    rows, sets = load_features(
        run.model, run.data, run.task, run.split, run.languages, run.max_length, run.max_rows or None
    )
    model = build_model(run)
    trainer = make_trainer(run, model, tokenizer, rows, sets, folder, save_steps)
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint:
        show("goes on from", checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    epochs = [entry for entry in trainer.state.log_history if "scores" in entry]
    return {
        "epochs": epochs,
        "trained_parameters": count_trainable(model),
        "versions": {name: version(name) for name in ("peft-sparsegrad", "peft", "transformers", "torch")},
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
    }


def make_trainer(
    run: Run,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Features,
    sets: dict[str, EvaluationSet],
    folder: Path,
    save_steps: int,
) -> Trainer:
    """The Trainer that scores the sets after each epoch, and writes checkpoints."""
    score_languages = ScoreLanguages(sets, TASKS[run.task].metric)
    trainer = bare_trainer(run, model, tokenizer, rows, folder, [SaveWithinEpochs(save_steps), score_languages])
    score_languages.trainer = trainer
    return trainer


def bare_trainer(
    run: Run,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Features,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """The Trainer with the method's optimizer and callbacks, and after them those that are given."""
    trainer = Trainer(
        model,
        _arguments(run, len(rows), folder),
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=KINDS[TASKS[run.task].kind].collator(tokenizer),
        callbacks=[*own_callbacks(run.method), *callbacks],
        optimizers=(make_optimizer(run.method, model, run.lr), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(run: Run, rows: int, folder: Path) -> TrainingArguments:
    return training_arguments(
        TrainingArguments,
        folder,
        lr=run.lr,
        batch_size=run.batch_size,
        epochs=run.epochs,
        seed=run.seed,
        per_device_eval_batch_size=2 * run.batch_size,
        warmup_steps=rising_steps(count_steps(rows, run.batch_size, run.epochs)),
        bf16=run.precision == "bf16",
        eval_strategy="no",  # `ScoreLanguages` says when
        save_strategy="no",  # and so do it and `SaveWithinEpochs`
        save_total_limit=1,
        logging_strategy="no",
    )
