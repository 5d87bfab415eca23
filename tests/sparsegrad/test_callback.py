"""SparseGradCallback in the Trainer: what it measures, gathers and leaves as it was."""

import random
import threading

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from tiny import adapted, rows
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from peft_sparsegrad import SparseGradCallback
from peft_sparsegrad.sparsegrad.carried_state import CarriedState
from peft_sparsegrad.sparsegrad.energy_probe import EnergyProbe
from peft_sparsegrad.sparsegrad.layer import layer_adapters
from peft_sparsegrad.sparsegrad.warmup.trainer_batches import _may_be_used_up


def trainer(model, path, callbacks=(), kind=Trainer, **settings):
    common = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_steps": 8}
    arguments = TrainingArguments(str(path), per_device_train_batch_size=2, **{**common, **settings})
    return kind(model, arguments, train_dataset=rows(64), callbacks=list(callbacks))


@pytest.mark.parametrize(("strategy", "probed"), [("steps", 2), ("epoch", 0), ("no", 0)])
def test_energy_is_measured_in_the_steps_that_are_logged(tmp_path, monkeypatch, strategy, probed):
    calls, own = [], EnergyProbe.__call__
    monkeypatch.setattr(EnergyProbe, "__call__", lambda *given: calls.append(1) or own(*given))
    model = adapted(warmup_steps=4)
    trainer(model, tmp_path, [SparseGradCallback()], logging_strategy=strategy, logging_steps=4).train()
    adapters = layer_adapters(model, "default")
    assert len(calls) == probed * len(adapters)
    assert all(adapter.probe is None for adapter in adapters)


def test_a_run_that_ends_between_two_logs_leaves_no_probe_behind(tmp_path):
    model = adapted(warmup_steps=4)
    adapters = layer_adapters(model, "default")
    callback = SparseGradCallback()
    callback._probe = EnergyProbe(adapters)
    callback.on_train_end(None, None, None)
    assert all(adapter.probe is None for adapter in adapters)


@pytest.mark.parametrize("steps", [0, 1, -3])
def test_steps_that_no_warm_up_can_do_with_are_refused(steps):
    with pytest.raises(ValueError, match=f"`steps` must be at least 2 .*, not {steps}"):
        SparseGradCallback(steps=steps)


def test_collators_draw_the_same_random_numbers_as_without_the_warm_up(tmp_path):
    drawn = {}
    for name, callbacks in (("with", [SparseGradCallback()]), ("without", [])):
        run = trainer(adapted(warmup_steps=4), tmp_path, callbacks, max_steps=3)
        own, drawn[name] = run.data_collator, []
        run.data_collator = lambda given, own=own, name=name: (
            drawn[name].append((random.random(), float(np.random.rand()))) or own(given)
        )
        run.train()
    assert drawn["with"][-3:] == drawn["without"][-3:]


class WithALog(Trainer):
    """A Trainer with attributes that cannot be copied, or that something else holds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._logs_to, self._shared = [threading.Lock()], {"model": self.model}
        self._metrics = {"loss": [0.5]}

    def compute_loss(self, *args, **kwargs):
        self._metrics["loss"].append(1.0)
        return super().compute_loss(*args, **kwargs)


def test_only_numbers_of_the_trainer_are_put_back(tmp_path):
    run = trainer(adapted(warmup_steps=4), tmp_path, [SparseGradCallback()], kind=WithALog, max_steps=3)
    shared, log = run._shared, run._logs_to
    run.train()
    assert run._shared is shared
    assert run._logs_to is log
    assert len(run._metrics["loss"]) == 1 + 3


def test_a_stream_of_datasets_can_be_read_again_in_a_shard_too():
    stream = Dataset.from_list(rows(4)).to_iterable_dataset()
    assert not _may_be_used_up(stream)
    assert not _may_be_used_up(IterableDatasetShard(stream))


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({"save_strategy": "steps", "save_steps": 1}, "on_step_end"),
        ({"save_strategy": "epoch"}, "on_epoch_end"),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, "on_epoch_end"),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}, "on_step_end"),
    ],
    ids=str,
)
def test_what_other_ranks_hold_is_gathered_before_every_checkpoint(tmp_path, monkeypatch, settings, at):
    """By transformers' own order of callbacks, whose first decides whether to save."""
    gathered, model = [], adapted(warmup_steps=0)
    monkeypatch.setattr(CarriedState, "gather", lambda state: gathered.append(state))
    common = {"use_cpu": True, "report_to": [], "logging_strategy": "no", "metric_for_best_model": "loss"}
    arguments = TrainingArguments(str(tmp_path), **common, **settings)
    run = trainer(model, tmp_path, [SparseGradCallback()])
    handler = CallbackHandler(run.callback_handler.callbacks, model, None, None, None)
    state = TrainerState(global_step=1, max_steps=8, save_steps=1, eval_steps=1, logging_steps=0)
    getattr(handler, at)(arguments, state, TrainerControl())
    assert len(gathered) == len(layer_adapters(model, "default"))


def summed(outputs, labels, num_items_in_batch):
    """A loss that needs the number of items, as transformers hands it to every loss of a Trainer."""
    loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / num_items_in_batch


def test_a_loss_is_given_the_number_of_items_as_in_training(tmp_path):
    callback, model = SparseGradCallback(), adapted(warmup_steps=4)
    run = trainer(model, tmp_path, [callback])
    run.compute_loss_func = summed
    run.train()
    assert callback.report.passes == 4


class InPairs(Trainer):
    """A Trainer whose batches are of a row and the one after it, each of which alone says nothing."""

    def get_train_dataloader(self):
        pairs = [[row, row + 1] for row in range(0, 32, 2)]
        return DataLoader(self.train_dataset, batch_sampler=pairs, collate_fn=self.data_collator)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs["input_ids"].clone())
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_the_warm_up_has_the_batches_of_the_trainers_own_sampler(tmp_path):
    run = trainer(adapted(warmup_steps=4), tmp_path, [SparseGradCallback()], kind=InPairs, max_steps=3)
    run.seen = []
    run.train()
    assert len(run.seen) == 4 + 3
    assert all(torch.equal(own, other) for own, other in zip(run.seen[:3], run.seen[4:], strict=True))


class FromGenerator(InPairs):
    """A Trainer whose batches are told by a generator, which runs once and cannot be copied."""

    def get_train_dataloader(self):
        self.told = []
        pairs = (self.told.append(row) or [row, row + 1] for row in range(0, 32, 2))
        return DataLoader(self.train_dataset, batch_sampler=pairs, collate_fn=self.data_collator)


def test_a_sampler_that_cannot_be_copied_is_read_by_training_alone(tmp_path, caplog):
    callback = SparseGradCallback()
    run = trainer(adapted(warmup_steps=4), tmp_path, [callback], kind=FromGenerator, max_steps=16)
    run.seen = []
    run.train()
    assert "observes the first 4 passes of training, because their batches cannot be drawn before it" in caplog.text
    assert callback.report.passes == 4
    assert run.told == list(range(0, 32, 2))
    assert run.state.global_step == len(run.seen) == 16
