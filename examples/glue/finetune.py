"""One run: train with transformers' Trainer, score the dev rows after every epoch, stop early, keep the best."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from experiments.attachment import make_callbacks
from experiments.costs import StepMemory, StepTimer, bytes_to_keep
from experiments.environment import describe_environment
from experiments.json_files import Record
from experiments.loading import DEVICE
from experiments.training import count_steps, rising_steps, training_arguments
from peft_sparsegrad.cli.errors import InputError

from .checkpoints import checkpoint_path, keep_model, last_checkpoint
from .dataset import Splits, take_rows
from .model import TrainedModel, build_model
from .optimizer import make_optimizer
from .runs import Run
from .tasks import TASKS, Task

EVAL_BATCH_SIZE = 64
TIMES = ("_runtime", "_per_second")  # ends of the names of what the Trainer measures besides


class TrainingError(InputError):
    """The training itself has failed, for instance because its learning rate was too high."""


class Costs:
    """Costs of a run, measured while it trains."""

    def __init__(self) -> None:
        self.timer, self.memory = StepTimer(), StepMemory()

    def of(self, trained: TrainedModel) -> Record | None:
        """Seconds and bytes, see `experiments.costs`; None if this process has found the training finished."""
        if not self.timer.seconds:
            return None
        return {
            "seconds_per_step": self.timer.median,
            "warmup_seconds": self.timer.warmup_seconds,
            "peak_memory": self.memory.peak_memory,
            "optimizer_bytes": self.memory.optimizer_bytes,
            "saved_bytes": bytes_to_keep(trained.model),
        }


@dataclass
class Finetuner:
    """Everything that the runs of one command have in common.

    Attributes:
        tokenizer: Of the checkpoint.
        splits: The rows of each task, as tokens.
        folder: Where runs in progress have their folders.
        report_to: Trackers that the Trainer logs to.
        models: Where each run's best model is kept; None keeps none.
    """

    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Splits]
    folder: Path
    report_to: list[str]
    models: Path | None = None

    def finish(self, run: Run) -> Record:
        """Do the run, or what is left of it. Returns its result; its folder stays until `clean_up`.

        Raises:
            InputError: If the checkpoint does not take the method, or there are too few rows.
            TrainingError: If the training fails.
        """
        started, task, folder = time.perf_counter(), TASKS[run.task], self.folder / run.folder_name
        trained, costs = build_model(run, task), Costs()
        found = last_checkpoint(folder)
        if found is not None and is_over(found[1], run.patience):
            state = found[1]
        else:
            trainer = self._trainer(run, task, trained, folder, costs)
            state = _train(trainer, run, None if found is None else str(found[0]))
        if self.models is not None:
            self._keep(run, checkpoint_path(folder, best_evaluation(state)["step"]))
        return {
            **summarize(state),
            "trainable": trained.counts,
            "costs": costs.of(trained),
            "environment": describe_environment(torch.device(DEVICE)),
            "seconds": time.perf_counter() - started,
        }

    def clean_up(self, run: Run) -> None:
        """Delete the run's checkpoints: its result has been written. What a tracker has logged beside them stays."""
        folder = self.folder / run.folder_name
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()

    def _keep(self, run: Run, checkpoint: Path) -> None:
        assert self.models is not None
        self.models.mkdir(parents=True, exist_ok=True)
        keep_model(checkpoint, self.models / run.folder_name)
        self.tokenizer.save_pretrained(self.models / run.folder_name)

    def _trainer(self, run: Run, task: Task, trained: TrainedModel, folder: Path, costs: Costs) -> Trainer:
        rows = take_rows(self.splits[run.task].train, run.train_rows, run.seed)
        of_method = make_callbacks(run.method, trained.model, run.warmup_steps, run.head_steps)
        stop = EarlyStoppingCallback(early_stopping_patience=run.patience)
        return Trainer(
            trained.model,
            _arguments(run, folder, len(rows), self.report_to),
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            eval_dataset=self.splits[run.task].dev,  # pyright: ignore[reportArgumentType]
            data_collator=DataCollatorWithPadding(self.tokenizer),
            callbacks=[costs.timer, *of_method, costs.memory, costs.timer.stop, stop],
            optimizers=(make_optimizer(run, trained), None),
            compute_metrics=_scorer(task),
        )


def _arguments(run: Run, folder: Path, num_rows: int, report_to: list[str]) -> TrainingArguments:
    return training_arguments(
        TrainingArguments,
        folder,
        lr=run.lr,
        batch_size=run.batch_size,
        epochs=run.epochs,
        seed=run.seed,
        run_name=str(run),
        per_device_eval_batch_size=EVAL_BATCH_SIZE,
        warmup_steps=rising_steps(count_steps(num_rows, run.batch_size, run.epochs), run.lr_warmup),
        bf16=run.precision == "bf16",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        # With 1, the Trainer would delete the last checkpoint before its result is written.
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on where it was
        label_names=["labels"],
        report_to=report_to,
    )


def _scorer(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    def score(prediction: EvalPrediction) -> dict[str, float]:
        return task.score(prediction.predictions, prediction.label_ids)  # pyright: ignore[reportArgumentType]

    return score


def _train(trainer: Trainer, run: Run, checkpoint: str | None) -> TrainerState:
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:  # what the warm-up raises for a loss that is no number
        raise TrainingError(f"{run}: {error}") from error
    return trainer.state


def evaluations(state: TrainerState) -> list[dict[str, Any]]:
    """Return the figures of each evaluation, without the Trainer's `eval_`."""
    entries = [entry for entry in state.log_history if "eval_score" in entry]
    return [
        {key.removeprefix("eval_"): value for key, value in entry.items() if not key.endswith(TIMES)}
        for entry in entries
    ]


def is_over(state: TrainerState, patience: int) -> bool:
    """Return whether a run with this state has nothing left to train."""
    scores = [entry["score"] for entry in evaluations(state)]
    since_best = len(scores) - 1 - scores.index(max(scores)) if scores else 0
    return state.global_step >= state.max_steps or since_best >= patience


def best_evaluation(state: TrainerState) -> dict[str, Any]:
    """The one with the highest score, the first of equals: the Trainer keeps the same one's checkpoint."""
    return max(evaluations(state), key=lambda entry: entry["score"])


def summarize(state: TrainerState) -> Record:
    """The score of the best epoch, and what was found after each."""
    best = best_evaluation(state)
    return {"score": best["score"], "best_epoch": round(best["epoch"]), "evaluations": evaluations(state)}
