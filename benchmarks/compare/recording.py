"""What a run remembers while the Trainer trains: times, losses, scores, and which data it saw."""

from __future__ import annotations

import time
import zlib
from typing import Any

import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback

from .tasks import Task


class StepTimer(TrainerCallback):
    """Writes the seconds of each optimisation step, from its forward pass to its last callback, into `seconds`.

    The Trainer calls its callbacks in order. With the timer first and its `stop` last, what the callbacks between
    them do at either end of a step counts.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.stop = _Stop(self)
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()


class _Stop(TrainerCallback):
    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.timer.seconds.append(time.perf_counter() - self.timer.started)


class RecordingTrainer(Trainer):
    """A Trainer that remembers what it saw.

    Attributes:
        losses: Loss of each training batch.
        order: Checksum of the training batches in the order in which they came; not those of a method's warm-up.
        scores: What the task's `score` gave, one entry per evaluation.
    """

    def __init__(self, task: Task, *args: Any, **kwargs: Any) -> None:
        self.task = task
        self.losses: list[float] = []
        self.order = 0
        self.scores: list[dict[str, float]] = []
        super().__init__(*args, compute_metrics=self._score, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        for name in ("input_ids", "labels"):
            self.order = zlib.crc32(inputs[name].cpu().numpy().tobytes(), self.order)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss.item())
        return loss

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        # The Trainer's own loss counts the rows of a smaller last batch as if it were full; the task's does not.
        self.scores.append(self.task.score(prediction.predictions, prediction.label_ids))  # pyright: ignore
        return self.scores[-1]
