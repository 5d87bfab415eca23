"""A callback for transformers' Trainer and TRL's trainers that announces steps and epochs to GradDrop."""

from __future__ import annotations

import math
import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.training.calling_trainer import LoggedFigures, trainer_of
from .config import GradDropConfig
from .training import GradDrop


class GradDropCallback(TrainerCallback):
    """Trainer callback that announces steps and epochs to GradDrop, and logs the share of entries that trains.

    Because steps are announced, a resumed run draws the masks of the uninterrupted one.

    Without `config` it serves the model's GradDrop adapter. With `config` it masks the gradients of whatever else
    trains: LoRA matrices, a SparseGrad adapter, or all weights; [`GradDrop`] says which parameters. A streamed dataset
    has no epochs, so the configuration's `num_epochs` divides `max_steps` into equal parts.

    At every logging step it adds `graddrop_rate`, `graddrop_active` and `graddrop_moved`, the shares that
    `GradDrop.report` returns, to the log that is printed, kept in `trainer.state.log_history` and given to trackers
    such as TensorBoard.

    Args:
        config: Settings for a model that has no GradDrop adapter.
    """

    def __init__(self, config: GradDropConfig | None = None) -> None:
        self.config = config
        self.graddrop: GradDrop | None = None
        self._is_stream = False
        self._figures = LoggedFigures(self._measure)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._figures.put_first(trainer_of(self))
        if self.graddrop is not None:  # left behind by a run that was interrupted
            self.graddrop.remove()
        self.graddrop = GradDrop(kwargs["model"], self.config, optimizer=kwargs.get("optimizer"))
        self._announce_length(args, state)
        self._announce(args, state)  # another callback's warm-up may come before the first step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._announce(args, state)

    def _announce_length(self, args: TrainingArguments, state: TrainerState) -> None:
        """Announce the number of epochs.

        For a stream it is the configuration's, because a stream has no epochs of its own.

        Raises:
            ValueError: If the dataset is a stream and the masks need epochs, but the configuration names no number.
        """
        assert self.graddrop is not None
        self._is_stream = state.num_train_epochs == sys.maxsize
        for sampler in self.graddrop.samplers:
            if not self._is_stream:
                sampler.set_num_epochs(max(1, math.ceil(state.num_train_epochs or args.num_train_epochs)))
            elif sampler.num_epochs is None and sampler.config.needs_epoch:
                raise ValueError(
                    "a dataset that is a stream has no epochs: set `num_epochs` in the GradDrop configuration, and "
                    "each is an equal part of `max_steps`"
                )

    def _announce(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.graddrop is not None
        for sampler in self.graddrop.samplers:
            sampler.progress.set_step(state.global_step)
            epoch, num_epochs = int(state.epoch or 0), sampler.num_epochs or 1
            if self._is_stream:
                epoch = state.global_step * num_epochs // state.max_steps
            sampler.set_epoch(min(epoch, num_epochs - 1))  # a finished run that is resumed is past its last epoch

    def _measure(self) -> dict[str, float]:
        if self.graddrop is None:
            return {}
        return {f"graddrop_{key}": share for key, share in self.graddrop.report().items()}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.graddrop is not None:
            self.graddrop.remove()
            self.graddrop = None
