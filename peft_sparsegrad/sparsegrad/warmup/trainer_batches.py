"""Batches and losses of a Trainer, for a warm-up before its first step that leaves no trace in the run."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard, SeedableRandomSampler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from transformers import Trainer, set_seed

from ...common.training.distributed import agree, world_size
from .passes import finite_loss, has_labels
from .ranks import WAY_OUT


def draws_from_dataset(trainer: Trainer, dataloader: DataLoader) -> bool:
    """Return whether a trainer's batches can be drawn from its dataset without loss to the training that follows.

    They cannot if the trainer makes them while it trains, from the model's own answers for instance, or if reading the
    dataset, or a batch sampler of which there is no copy, may use it up. A streamed dataset of the `datasets` library
    can be read again.
    """
    kind = type(trainer)
    makes_inputs = kind._prepare_inputs is not Trainer._prepare_inputs
    has_own_step = kind.training_step is not Trainer.training_step and kind.compute_loss is Trainer.compute_loss
    return not (makes_inputs or has_own_step or _may_be_used_up(dataloader.dataset)) and _can_copy(dataloader)


def _may_be_used_up(dataset: Any) -> bool:
    dataset = dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset
    return isinstance(dataset, IterableDataset) and not type(dataset).__module__.startswith("datasets.")


def _can_copy(dataloader: DataLoader) -> bool:
    """Return whether there can be a loader of the same batches with a state of its own."""
    try:
        _loader(dataloader, seed=0)
    except (TypeError, NotImplementedError, RuntimeError):  # copying an open file, a generator or a lock
        return False
    return True


class TrainerBatches:
    """Source of batches like those of a Trainer's training, and of the loss that it trains on.

    Args:
        trainer: The Trainer.
        model: Its model.
        dataloader: Its loader, whose own state does not change.

    Attributes:
        passed_over: Number of batches without a label other than -100.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, dataloader: DataLoader) -> None:
        self.trainer, self.model = trainer, model
        self.passed_over, self._index = 0, 0
        self._batches = self._endless(_loader(dataloader, trainer.args.seed))

    def run_pass(self) -> None:
        """Run a forward and a backward pass of the next batch."""
        self.next_loss().backward()

    def next_loss(self) -> torch.Tensor:
        """Return the loss of the next batch, as the Trainer computes it.

        Raises:
            ValueError: If some rank has no batch with labels.
        """
        batch = next(self._batches, None)
        if not agree(f"warm-up batch {self._index}", self.trainer.args.device, WAY_OUT, ok=batch is not None):
            raise ValueError("the training dataset is empty, or all its labels are -100: there is no gradient")
        (batch,), num_items = self.trainer.get_batch_samples(iter([batch]), 1, self.trainer.args.device)
        inputs = self.trainer._prepare_inputs(cast(dict[str, Any], batch))
        with self.trainer.compute_loss_context_manager():
            loss = cast(torch.Tensor, self.trainer.compute_loss(self.model, inputs, num_items_in_batch=num_items))
        self._index += 1
        return finite_loss(loss, self._index - 1)

    def _endless(self, loader: DataLoader) -> Iterator[Any]:
        """Yield the batches with labels over and over, and end if there are none."""
        while True:
            found = False
            for batch in loader:
                if has_labels(batch):
                    found = True
                    yield batch
                else:
                    self.passed_over += 1
            if not found:
                return

    @contextmanager
    def as_in_training(self) -> Iterator[None]:
        """Compute passes as in the Trainer's steps, and undo inside the Trainer whatever they have changed.

        The model is in training mode, with dropout, and the random states of Python, NumPy and torch are the warm-up's
        own.
        """
        counters = {name: value for name, value in vars(self.trainer).items() if _is_counter(name, value)}
        before = copy.deepcopy(counters)
        of_python, of_numpy = random.getstate(), np.random.get_state()
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        self.model.train()
        with torch.random.fork_rng(devices=devices):
            set_seed(self.trainer.args.seed)
            try:
                yield
            finally:
                vars(self.trainer).update(before)
                random.setstate(of_python)
                np.random.set_state(of_numpy)


def _is_counter(name: str, value: Any) -> bool:
    """Return whether an attribute of a Trainer may be a metric or a count that computing a loss adds to."""
    return name.startswith("_") and _is_of_numbers(value)


def _is_of_numbers(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_of_numbers, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float)


def _loader(dataloader: DataLoader, seed: int) -> DataLoader:
    """Return a loader like the Trainer's, whose own state must not change; each rank draws different batches."""
    dataset, sampler = dataloader.dataset, None
    if not (isinstance(dataset, IterableDataset) or _draws_at_random(dataloader.batch_sampler)):
        batches = copy.deepcopy(dataloader.batch_sampler, {id(dataset): dataset})
        return DataLoader(dataset, batch_sampler=batches, collate_fn=dataloader.collate_fn)
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


def _draws_at_random(batch_sampler: Any) -> bool:
    """Return whether batches are of any rows, and not of those that a sampler of the user's puts together."""
    inner = batch_sampler.batch_sampler if isinstance(batch_sampler, BatchSamplerShard) else batch_sampler
    usual = RandomSampler, SequentialSampler, DistributedSampler, SeedableRandomSampler
    return inner is None or (type(inner) is BatchSampler and type(inner.sampler) in usual)
