"""The watcher of optimizers' steps: what it leaves behind."""

import copy
import gc
import weakref

import pytest
import torch
from tiny import adapted, batch
from torch import nn


class Failing(torch.optim.SGD):
    """An optimizer whose step runs out of memory, until there is more of it."""

    fails = True

    def step(self, closure=None):
        if self.fails:
            raise MemoryError
        return super().step(closure)


def test_a_step_that_fails_keeps_neither_its_optimizer_nor_its_parameters_alive():
    """Of any optimizer of the process, once there is an adapter."""
    model, other = adapted(warmup_steps=0), nn.Linear(4, 4)
    optimizer = Failing(other.parameters(), lr=0.1)
    with pytest.raises(MemoryError):
        optimizer.step()
    alive = [weakref.ref(optimizer), weakref.ref(other.weight)]
    del optimizer, other
    gc.collect()
    assert [each() for each in alive] == [None, None]
    assert model(**batch()).loss.isfinite()


def test_a_step_after_one_that_failed_is_counted():
    model = adapted(warmup_steps=0)
    optimizer = Failing([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch()).loss.backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.adapter("default").num_steps == 1


def test_an_optimizer_can_be_copied_after_a_step_that_failed():
    model = adapted(warmup_steps=0)
    optimizer = Failing([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert len(copy.deepcopy(optimizer).param_groups) == 1
