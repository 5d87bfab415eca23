"""A callback for transformers' Trainer and TRL's trainers that runs the warm-up and logs the energy captured."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.distributed import mean_over_ranks, world_size
from .adapter import LayerAdapter
from .energy_probe import EnergyProbe
from .gradient_sums import load_gradient_sums, save_gradient_sums
from .layer import SparseGradLayer, layer_adapters
from .report import WarmUpReport
from .warmup import batch_loss, warmup

logger = logging.getLogger("peft_sparsegrad")


class SparseGradCallback(TrainerCallback):
    """Trainer callback that runs the warm-up before the first step, on the Trainer's data, and logs energy captured.

    The warm-up draws its batches with a random state of its own, so that it changes neither the data nor the dropout
    of training. A run that is resumed from a checkpoint takes the result of the warm-up from there. Checkpoints also
    hold the gradient sums from which the next renewal chooses supports, `sparsegrad_gradient_sums_*.safetensors`.

    Args:
        steps: Number of batches for the warm-up; None for the configuration's `warmup_steps`.
        head_steps: Number of steps that train everything but the SparseGrad values before the warm-up (AdamW, the
            Trainer's learning rate), because a new task head's first gradients say little about the task.
        log_energy: True to add `sparsegrad_energy_in_core` and `sparsegrad_energy_in_support` to the log at every
            logging step: the shares of the gradient's energy that the core can express and that the support holds.

    Attributes:
        report: The [`WarmUpReport`] after the warm-up, else None.
    """

    def __init__(self, steps: int | None = None, head_steps: int = 0, log_energy: bool = True) -> None:
        if head_steps < 0:
            raise ValueError(f"`head_steps` must not be negative, it is {head_steps}")
        self.steps, self.head_steps, self.log_energy = steps, head_steps, log_energy
        self.report: WarmUpReport | None = None
        self._probe: EnergyProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        adapter_name, adapters = _trained_adapter(model)
        if all(adapter.is_settled for adapter in adapters):
            if state.global_step:
                _restore_gradient_sums(args, state, adapters)
            return
        model.train()  # as in the Trainer's steps, with dropout and gradient checkpointing
        with _own_random_state(args.seed), _precision(args):
            batches = _endless(_loader(kwargs["train_dataloader"], args.seed), model)
            if self.head_steps:
                settle_head(model, batches, self.head_steps, args.learning_rate, adapters)
            steps = self.steps or adapters[0].plan.warmup_steps
            self.report = warmup(model, batches, steps, adapter_name)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.log_energy and state.logging_steps and (state.global_step + 1) % state.logging_steps == 0:
            self._probe = EnergyProbe(_trained_adapter(kwargs["model"])[1])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _, adapters = _trained_adapter(kwargs["model"])
        save_gradient_sums(adapters, _checkpoint(args, state), args.process_index)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._probe is None or logs is None or "loss" not in logs:
            return
        measured = {f"sparsegrad_{key}": share for key, share in self._probe.finish().items()}
        self._probe = None
        logs.update(measured)
        state.log_history[-1].update(measured)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _restore_gradient_sums(args: TrainingArguments, state: TrainerState, adapters: list[LayerAdapter]) -> None:
    """Restore gradient sums from the checkpoint that the Trainer has resumed from.

    The Trainer does not say which checkpoint that is, so the one is taken whose values agree with the adapters'.
    """
    named = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
    for folder in [*named, _checkpoint(args, state)]:
        if load_gradient_sums(adapters, folder, args.process_index):
            return
    logger.warning(
        "The checkpoint's SparseGrad gradient sums are not in %s: the next renewal of the supports will go by the "
        "gradients from here on, so that this run is not bit for bit the one that was interrupted.",
        args.output_dir,
    )


def _trained_adapter(model: nn.Module) -> tuple[str, list[LayerAdapter]]:
    layers = [module for module in model.modules() if isinstance(module, SparseGradLayer)]
    if not layers:
        raise ValueError("`SparseGradCallback` needs a model with a SparseGrad adapter, and this one has none")
    adapter_name = layers[0].active_adapters[0]
    return adapter_name, layer_adapters(model, adapter_name)


def _loader(dataloader: DataLoader, seed: int) -> DataLoader:
    """Return a loader like the Trainer's, whose own state must not change; each rank draws different batches."""
    dataset, sampler = dataloader.dataset, None
    if not isinstance(dataset, IterableDataset):
        generator = torch.Generator().manual_seed(seed)
        distributed = world_size() > 1
        sampler = (
            DistributedSampler(dataset, seed=seed)
            if distributed
            else RandomSampler(cast(Sized, dataset), generator=generator)
        )
    batch_size = dataloader.batch_size or getattr(dataloader.batch_sampler, "batch_size", 1)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=dataloader.collate_fn)


def _endless(loader: DataLoader, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield batches on the model's device, and start again when the loader ends."""
    device, empty = next(model.parameters()).device, True
    while True:
        for batch in loader:
            empty = False
            yield {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
        if empty:
            raise ValueError("the training dataset is empty: the warm-up has nothing to look at")


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _precision(args: TrainingArguments) -> AbstractContextManager[Any]:
    """Return a context for the Trainer's mixed precision if it is bf16; float16 would need its gradient scaler too."""
    if not args.bf16:
        return nullcontext()
    return torch.autocast(args.device.type, dtype=torch.bfloat16)


def settle_head(
    model: nn.Module, batches: Iterator[dict[str, Any]], steps: int, lr: float, adapters: list[LayerAdapter]
) -> None:
    """Train everything that requires a gradient except the SparseGrad values, with AdamW.

    Args:
        model: A model with a SparseGrad adapter.
        batches: Batches for `model(**batch).loss`.
        steps: Number of steps, one batch each.
        lr: Learning rate.
        adapters: The SparseGrad adapter on each of its layers, which does not train.
    """
    values = {adapter.values for adapter in adapters}
    head = [p for p in model.parameters() if p.requires_grad and p not in values]
    if not head:
        raise ValueError(
            "`head_steps` is set, but nothing besides SparseGrad trains: name the head in `modules_to_save`"
        )
    optimizer = AdamW(head, lr=lr)
    for _ in range(steps):
        loss = batch_loss(model, next(batches))
        if loss is None:
            raise ValueError("the batches gave no loss: put `labels` into them")
        for parameter, gradient in zip(head, torch.autograd.grad(loss, head, allow_unused=True), strict=True):
            parameter.grad = None if gradient is None else mean_over_ranks(gradient)
        optimizer.step()
    optimizer.zero_grad()
