"""Records of a run while the Trainer trains: times, losses, scores, and the data that it saw."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.costs import step_memory

from .batches import LengthWindows
from .head import train_head_apart
from .task import Task


class EvaluateAfter(TrainerCallback):
    """Has the Trainer evaluate after the given steps."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = set(steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_evaluate = state.global_step in self.steps


class _MeasureMemory(TrainerCallback):
    """Measures before the method's own callbacks take down what they have set up for training."""

    def __init__(self, trainer: RecordingTrainer) -> None:
        self.trainer = trainer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.memory = self.trainer.measure_memory()


class RecordingTrainer(Trainer):
    """A Trainer that remembers what it saw.

    Attributes:
        losses: Loss of each training batch.
        order: Checksum of the training batches in the order in which they came; not those of a method's warm-up.
        memory: What `step_memory` found, after training.
        evaluations: What the task's `score` gave, one entry per evaluation, with the step after which it was.
    """

    def __init__(self, task: Task, *args: Any, callbacks: Iterable[TrainerCallback] = (), **kwargs: Any) -> None:
        self.task = task
        self.memory: dict[str, int] = {}
        self.losses: list[float] = []
        self.order = 0
        self.evaluations: list[dict[str, Any]] = []
        kwargs["callbacks"] = [_MeasureMemory(self), *callbacks]
        super().__init__(*args, compute_metrics=self._score, preprocess_logits_for_metrics=task.reduce, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        for name in ("input_ids", "labels"):
            self.order = zlib.crc32(inputs[name].cpu().numpy().tobytes(), self.order)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss.item())
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own. A class with a `training_step` and no `compute_loss` may have its loss in the former, so
        that `SparseGradCallback` would observe the training in place of batches before it.
        """
        return super().compute_loss(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The method's optimizer, or the Trainer's; the head has its own learning rate whatever the method's is."""
        optimizer = super().create_optimizer(*args, **kwargs)
        train_head_apart(optimizer, cast(nn.Module, self.model))
        return optimizer

    def measure_memory(self) -> dict[str, int]:
        """Bytes of one more step on the first training rows: the same batch for every method.

        The learning rate has come down to 0 and the scores are in, so that the step changes nothing that is reported.
        """
        model, rows = cast(nn.Module, self.model), cast(Any, self.train_dataset)
        batch = self._prepare_inputs(self.data_collator(rows[: self.args.train_batch_size]))

        def forward() -> torch.Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, batch)  # pyright: ignore

        model.train()
        model.zero_grad()
        return step_memory(model, self.optimizer, forward)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        rows: Any = train_dataset or self.train_dataset
        lengths = [len(row["input_ids"]) for row in rows]
        return LengthWindows(lengths, self.args.train_batch_size, self.args.seed)

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        # The Trainer's own loss counts the rows of a smaller last batch as if it were full; the task's does not.
        scores = self.task.score(prediction.predictions, prediction.label_ids)  # pyright: ignore
        self.evaluations.append({"step": self.state.global_step, **scores})
        return scores
