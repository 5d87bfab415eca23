"""Renewals and the optimizer: which of its steps count, and where its state begins anew."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from renewal_tools import adamw, counted, layers, step, supports, trained_parameters
from tiny import adapted, batch
from torch import nn

from peft_sparsegrad import SparseGradConfig, create_sparsegrad_optimizer
from peft_sparsegrad.common.training.optimizer_watcher import observers
from peft_sparsegrad.common.training.pieces import piece_of
from peft_sparsegrad.sparsegrad.renewal import reset_state


def test_sparsegrads_own_optimizer():
    model = adapted(renewal_steps=3)
    optimizer = create_sparsegrad_optimizer(model, lr=0.02)
    before = supports(model)
    losses = [step(model, optimizer, number) for number in range(20)]
    assert supports(model) != before
    assert losses[-4:] < losses[:4]


def fake_optimizer(values: torch.Tensor, **state) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([values], lr=0.1)
    optimizer.state[values] = state
    return optimizer


RENEWED = torch.tensor([False, True, False, True])


def test_scales_begin_with_their_mean_and_all_else_with_zero():
    values = nn.Parameter(torch.zeros(4))
    optimizer = fake_optimizer(
        values,
        scale=torch.tensor([1.0, 2.0, 0.0, 9.0]),
        momentum=torch.tensor([1.0, -2.0, 3.0, 4.0]),
        negative=torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        half=torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.bfloat16),
        step=torch.tensor(7.0),
        several=torch.tensor([[1.0, -2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 2.0]]),
        number=3,
        nothing=None,
    )
    state = optimizer.state[values]
    scale = state["scale"]
    reset_state(optimizer, piece_of(values), RENEWED)
    assert state["scale"] is scale, "in place, for whoever else holds it"
    assert {key: s.tolist() if isinstance(s, torch.Tensor) else s for key, s in state.items()} == {
        "scale": [1, 3, 0, 3],
        "momentum": [1, 0, 3, 0],
        "negative": [-1, 0, -3, 0],
        "half": [1, 3, 3, 3],
        "step": 7,
        "several": [[1, 0, 3, 0], [0, 0, 1, 0]],
        "number": 3,
        "nothing": None,
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
def test_state_in_blocks_begins_anew(dtype):
    values, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizer = fake_optimizer(values, state1=torch.ones(4, dtype=dtype), scale=torch.ones(4), absmax1=torch.ones(1))
    optimizer.state[other] = {"scale": torch.ones(4)}
    reset_state(optimizer, piece_of(values), RENEWED)
    assert values not in optimizer.state
    assert optimizer.state[other] == {"scale": optimizer.state[other]["scale"]}
    reset_state(optimizer, piece_of(values), RENEWED)
    assert values not in optimizer.state, "an optimizer without state has nothing to move, and gets none"


def test_optimizer_that_does_not_hold_the_values():
    model = adapted(renewal_steps=2, modules_to_save=["lm_head"])
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    before, optimizer = supports(model), torch.optim.AdamW(head, lr=0.01)
    for number in range(5):
        step(model, optimizer, number)
    assert supports(model) == before
    assert counted(model) == {0}


def test_two_optimizers_count_once_each_for_what_they_hold():
    model = adapted(renewal_steps=4, modules_to_save=["lm_head"])
    values = [p for n, p in model.named_parameters() if "sparsegrad_adapter" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    optimizers = [torch.optim.AdamW(values[:2]), torch.optim.AdamW(values[2:]), torch.optim.AdamW(head)]
    model(**batch()).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert counted(model) == {1}


class Nested(torch.optim.SGD):
    """An optimizer whose step calls its base class's, for which torch's hook runs once more."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_step_within_a_step_counts_once(set_to_none):
    model = adapted(warmup_steps=0, renewal_steps=3)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()  # the base class is hooked when it is first made
    optimizer = Nested(trained_parameters(model), lr=0.1)
    for number in range(4):
        model(**batch(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert counted(model) == {4}


def test_values_that_an_unknown_engine_has_cut_are_refused():
    model = adapted(renewal_steps=2)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    for parameter in trained_parameters(model):
        parameter.data = parameter.data[:10]
        parameter.grad = torch.zeros(10)
    with pytest.raises(RuntimeError, match=r"10 of the 102 values of .*0\.mlp\.up_proj'.* set `renewal_steps=0`"):
        optimizer.step()


def test_frozen_adapter_is_left_alone_though_its_values_are_in_the_optimizer():
    model = adapted(renewal_steps=2, init_weights=False)
    model.add_adapter("other", SparseGradConfig(density=0.05, warmup_steps=0, renewal_steps=2, init_weights=False))
    before = [layer.adapter("other").values.detach().clone() for layer in layers(model)]
    old, own = supports(model, "other"), supports(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(5):
        step(model, optimizer, number)
    assert supports(model, "other") == old
    assert supports(model) != own
    assert (counted(model), counted(model, "other")) == ({5}, {0})
    for layer, values in zip(layers(model), before, strict=True):
        assert torch.equal(layer.adapter("other").values, values)
        assert layer.adapter("other").gradient_sum is None


def test_two_adapters_that_train_together_are_both_renewed():
    model = adapted(renewal_steps=2)
    model.add_adapter("other", SparseGradConfig(density=0.1, warmup_steps=0, renewal_steps=3))
    model.base_model.set_adapter(["default", "other"])
    own, other = supports(model), supports(model, "other")
    optimizer = adamw(model)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    assert supports(model) != own
    assert supports(model, "other") == other
    step(model, optimizer, 2)
    assert supports(model, "other") != other


def test_models_are_not_kept_alive():
    gc.collect()  # the models of other tests
    before = len(observers())
    model = adapted()
    assert len(observers()) == before + 6 + 2  # each layer's, and those of the first gradients and of small steps
    del model
    gc.collect()
    assert len(observers()) <= before


def test_adapters_are_taken_in_the_same_order_on_every_rank():
    """In the model's, also in a copy; a set's order depends on the addresses of its elements."""
    model = adapted()
    twin = copy.deepcopy(model)
    for made in (model, twin):
        own = [layer.adapter("default").training_state for layer in layers(made)]
        assert [id(each) for each in observers() if any(each is one for one in own)] == [id(each) for each in own]
