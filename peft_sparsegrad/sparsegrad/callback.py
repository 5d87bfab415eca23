"""A callback for transformers' Trainer and TRL's trainers that runs the warm-up and logs the energy captured."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.training.calling_trainer import LoggedFigures, trainer_of
from ..common.training.distributed import is_main_process
from ..common.training.zero import is_managed
from .adapter import LayerAdapter
from .energy_probe import EnergyProbe
from .layer import find_adapter
from .warmup.batches import check_steps
from .warmup.budget import budget_in_run
from .warmup.collector import WarmUpCollector
from .warmup.explicit import warmup
from .warmup.report import WarmUpReport
from .warmup.task_head import settle_head
from .warmup.trainer_batches import TrainerBatches, draws_from_dataset

logger = logging.getLogger("peft_sparsegrad")


class SparseGradCallback(TrainerCallback):
    """Trainer callback that runs the warm-up before the first step, on the Trainer's data and with its loss.

    The warm-up draws its batches with a random state of its own, so that it changes neither the data nor the dropout
    of training. Batches whose labels are all -100 are passed over. Where a trainer makes its batches while it trains,
    as in GRPO, its dataset may be a stream that can be read only once, or DeepSpeed trains, the first training steps
    are observed instead, and train nothing but the other parameters.

    A run that is resumed from a checkpoint takes the result of the warm-up from there.

    Args:
        steps: Number of backward passes of the warm-up; None for the configuration's `warmup_steps`.
        head_steps: Number of steps that train everything but the SparseGrad values before the warm-up (AdamW, the
            Trainer's learning rate), because a new task head's first gradients say little about the task.
        log_energy: True to add `sparsegrad_energy_in_core` and `sparsegrad_energy_in_support` to the log at every
            logging step, for trackers such as TensorBoard too: the shares of the gradient's energy that the core can
            express and that the support holds, each the median over the layers.

    Attributes:
        report: The [`WarmUpReport`] after the warm-up, else None.
    """

    def __init__(self, steps: int | None = None, head_steps: int = 0, log_energy: bool = True) -> None:
        if head_steps < 0:
            raise ValueError(f"`head_steps` must not be negative, it is {head_steps}")
        check_steps(steps)
        self.steps, self.head_steps, self.log_energy = steps, head_steps, log_energy
        self.report: WarmUpReport | None = None
        self._probe: EnergyProbe | None = None
        self._collector: WarmUpCollector | None = None
        self._figures = LoggedFigures(self._measure)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        adapter_name, adapters = find_adapter(kwargs["model"])
        trainer = trainer_of(self)
        self._figures.put_first(trainer)
        if all(adapter.is_settled for adapter in adapters):
            return
        if is_managed(adapters[0].values):
            self._observe_training(adapters, "DeepSpeed counts every backward pass as one of training")
        elif draws_from_dataset(trainer, kwargs["train_dataloader"]):
            batches = TrainerBatches(trainer, kwargs["model"], kwargs["train_dataloader"])
            with batches.as_in_training():
                if self.head_steps:
                    settle_head(kwargs["model"], batches.next_loss, self.head_steps, args.learning_rate, adapters)
                self.report = warmup(kwargs["model"], batches.run_pass, self._steps(adapters), adapter_name)
            self.report.passed_over += batches.passed_over
            if is_main_process():
                logger.warning(self.report.summary)
        else:
            self._observe_training(adapters, "their batches cannot be drawn before it")

    def _steps(self, adapters: list[LayerAdapter]) -> int:
        return adapters[0].plan.warmup_steps if self.steps is None else self.steps

    def _observe_training(self, adapters: list[LayerAdapter], reason: str) -> None:
        if self.head_steps:
            raise ValueError(
                "`head_steps` needs batches of a dataset that can be read twice, before training, and this trainer "
                "makes its batches while it trains, reads a stream, or trains with DeepSpeed: set `head_steps=0`"
            )
        steps = budget_in_run(self._steps(adapters), way_to_more="`peft_sparsegrad.warmup`")
        logger.warning(
            "SparseGrad's warm-up observes the first %d passes of training, because %s: the adapter trains from then "
            "on.",
            steps,
            reason,
        )
        collector = next(adapter.warmup for adapter in adapters if not adapter.is_settled)
        assert isinstance(collector, WarmUpCollector)
        self._collector = collector
        self._collector.budget = steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = args.logging_strategy == IntervalStrategy.STEPS and state.logging_steps
        if self.log_energy and logs and (state.global_step + 1) % state.logging_steps == 0:
            self._probe = EnergyProbe(find_adapter(kwargs["model"])[1])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._collector is not None and self._collector.done:
            self.report, self._collector = self._collector.report, None
        self._prepare_to_save(control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._prepare_to_save(control, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    def _prepare_to_save(self, control: TrainerControl, model: nn.Module) -> None:
        """Let the first rank have what a checkpoint is to hold; an evaluation may be followed by one of the best."""
        if control.should_save or control.should_evaluate:
            for adapter in find_adapter(model)[1]:
                adapter.training_state.carried.gather()

    def _measure(self) -> dict[str, float]:
        if self._probe is None:
            return {}
        probe, self._probe = self._probe, None
        return {f"sparsegrad_{key}": share for key, share in probe.finish().items()}
