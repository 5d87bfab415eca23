"""GradDrop in transformers' Trainer and TRL's trainers: announces steps and epochs, and logs how much trains."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .graddrop import GradDrop, GradDropConfig


class GradDropCallback(TrainerCallback):
    """Tells GradDrop the step and the epoch, so that a resumed run draws the masks of the uninterrupted one.

    Without `config` it serves the model's GradDrop adapter. With one it masks whatever else trains: LoRA matrices, a
    SparseGrad adapter, or all weights; see [`GradDrop`] for which. At every logging step it adds to the log
    `graddrop_rate`, `graddrop_active` and `graddrop_moved`, the shares that `GradDrop.report` returns.

    Args:
        config: Settings for a model that has no GradDrop adapter.
    """

    def __init__(self, config: GradDropConfig | None = None) -> None:
        self.config = config
        self.graddrop: GradDrop | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        num_epochs = max(1, math.ceil(state.num_train_epochs or args.num_train_epochs))
        self.graddrop = GradDrop(kwargs["model"], self.config, num_epochs)
        self._announce(state)  # another callback's warm-up may come before the first step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._announce(state)

    def _announce(self, state: TrainerState) -> None:
        assert self.graddrop is not None
        self.graddrop.set_step(state.global_step)
        self.graddrop.set_epoch(int(state.epoch or 0))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.graddrop is None or logs is None or "loss" not in logs:
            return
        measured = {f"graddrop_{key}": share for key, share in self.graddrop.report().items()}
        logs.update(measured)
        state.log_history[-1].update(measured)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.graddrop is not None:
            self.graddrop.remove()
