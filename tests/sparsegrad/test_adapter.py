"""Bases and layer adapters by themselves: writing in place, what is derived, and what follows the module elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.functional import pack_support
from peft_sparsegrad.sparsegrad.adapter import LayerAdapter
from peft_sparsegrad.sparsegrad.basis import Basis
from peft_sparsegrad.sparsegrad.plan import plan_weight

SHAPE = (6, 8)
RANKS = pytest.mark.parametrize("ranks", [(3, 4), (None, 4), (3, None)], ids=str)


def columns_for(ranks) -> dict[str, torch.Tensor | None]:
    """Columns of U and V for a weight (6, 8)."""
    r_out, r_in = ranks
    return {"U": None if r_in is None else torch.randn(8, r_in), "V": None if r_out is None else torch.randn(6, r_out)}


def new_adapter(**settings) -> LayerAdapter:
    """An adapter with 5 values in a core (3, 4), settled unless `warmup_steps` is given."""
    config = SparseGradConfig(**{"num_values": 5, "rank": (3, 4), "warmup_steps": 0, **settings})
    plan = plan_weight(config, "layers.0.up", SHAPE)
    return LayerAdapter(plan, torch.zeros(12 if plan.dynamic else 5), Basis(SHAPE, plan.ranks))


@RANKS
def test_fill_is_in_place_and_the_identity_stays(ranks):
    basis = Basis(SHAPE, ranks)
    held = {name: getattr(basis, name) for name in "UV"}
    columns = columns_for(ranks)
    for name, rank, features in (("U", ranks[1], 8), ("V", ranks[0], 6)):
        assert (held[name] is None) == (rank is None)
        assert rank is None or torch.equal(held[name], torch.eye(features, rank))
    basis.fill(**columns)
    for name, expected in columns.items():
        assert getattr(basis, name) is held[name]
        assert expected is None or torch.equal(held[name], expected)


@pytest.mark.parametrize("name", ["U", "V"])
def test_fill_refuses_columns_for_the_identity_and_the_identity_for_columns(name):
    ranks = (None, 4) if name == "V" else (3, None)
    basis, columns = Basis(SHAPE, ranks), columns_for(ranks)
    with pytest.raises(ValueError, match=f"{name} is the identity on one side and has columns on the other"):
        basis.fill(**{**columns, name: torch.randn(8 if name == "U" else 6, 2)})
    with pytest.raises(ValueError, match=f"{name} is the identity"):
        Basis(SHAPE, (3, 4)).fill(**{"U": torch.randn(8, 4), "V": torch.randn(6, 3), name: None})


def test_state_dict_holds_what_a_file_must_say():
    adapter = new_adapter()
    state = adapter.state_dict()
    assert sorted(state) == ["slots", "steps", "support", "values", "weight_shape"]
    assert state["weight_shape"].tolist() == [6, 8]
    assert state["steps"].tolist() == [0]
    assert new_adapter(warmup_steps=4).state_dict()["steps"].tolist() == [-1]
    assert state["slots"].tolist() == [0, 1, 2, 3, 4]
    assert new_adapter(support="dynamic").state_dict().keys().isdisjoint({"support", "slots"})


def test_support_that_is_written_to_or_replaced_by_hand_is_used():
    """Averages, loaders and broadcasts write into the buffers without calling the module."""
    adapter = new_adapter()
    first = adapter.indices.tolist()
    for new in ([0, 1, 2, 3, 4], [7, 8, 9, 10, 11]):
        adapter.support.copy_(pack_support(torch.tensor(new), 12))
        assert adapter.indices.tolist() == new != first
    adapter.support = pack_support(torch.tensor([0, 2, 4, 6, 8]), 12)
    assert adapter.indices.tolist() == [0, 2, 4, 6, 8]
    adapter.steps.fill_(-1)
    assert not adapter.is_settled
    adapter.steps.fill_(9)
    assert (adapter.is_settled, adapter.num_steps) == (True, 9)


def test_training_goes_on_after_a_look_in_inference_mode():
    adapter, x = new_adapter(), torch.randn(3, 8)
    with torch.inference_mode():
        adapter.add_delta(torch.zeros(3, 6), x)
    adapter.add_delta(torch.zeros(3, 6), x).square().sum().backward()
    assert adapter.values.grad is not None
    assert not adapter.indices.is_inference()


def test_settle_opens_and_closes_the_support_in_place():
    adapter = new_adapter(warmup_steps=4)
    held = adapter.support
    assert not adapter.is_settled
    adapter.settle(torch.tensor([1, 3, 5, 7, 11]))
    assert adapter.support is held
    assert (adapter.indices.tolist(), adapter.num_steps) == ([1, 3, 5, 7, 11], 0)
    adapter.settle(torch.tensor([7, 1, 11, 5, 3]))
    assert adapter.support is held
    assert adapter.indices.tolist() == [7, 1, 11, 5, 3]
    assert adapter.slots.tolist() == [3, 0, 4, 2, 1]
    adapter.unsettle()
    assert (adapter.is_settled, adapter.num_steps) == (False, -1)


def one_step(adapter: LayerAdapter) -> None:
    adapter.add_delta(torch.zeros(3, 6), torch.randn(3, 8)).square().sum().backward()
    torch.optim.SGD([adapter.values], lr=0.1).step()
    adapter.values.grad = None


def test_gradient_sum_is_float32_and_belongs_to_the_values():
    adapter = new_adapter(init_weights=False)
    nn.init.ones_(adapter.values)
    one_step(adapter)
    summed = adapter.gradient_sum
    assert summed.shape == (3, 4)
    assert summed.any()
    assert adapter.to(torch.float64).gradient_sum is summed
    assert summed.dtype == torch.float32
    adapter.to(torch.float32)
    state = copy.deepcopy(adapter.state_dict())
    adapter.load_state_dict({}, strict=False)
    assert adapter.gradient_sum is summed, "another module was loaded"
    adapter.load_state_dict(state)
    assert adapter.gradient_sum is None, "it belonged to other values"


@pytest.mark.parametrize("settings", [{"support": "dynamic"}, {"renewal_steps": 0}])
def test_support_that_is_not_renewed_has_no_gradient_sum(settings):
    adapter = new_adapter(**settings)
    one_step(adapter)
    assert adapter.gradient_sum is None
    assert adapter.core.leaf is None


def test_gradient_of_the_core_is_formed_only_where_the_values_train():
    adapter = new_adapter()
    adapter.values.requires_grad_(False)
    assert adapter.core.leaf is None
    adapter.values.requires_grad_(True)
    assert adapter.core.leaf is not None
    with torch.no_grad():
        assert adapter.core.leaf is None


def test_copy_has_its_own_tensors_and_steps_by_itself():
    adapter = new_adapter(renewal_steps=100)
    other = copy.deepcopy(adapter)
    assert other.basis is not adapter.basis
    optimizer = torch.optim.SGD([other.values], lr=0.1)
    other.add_delta(torch.zeros(3, 6), torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert (adapter.num_steps, other.num_steps) == (0, 1)


class NestedAdam(torch.optim.Adam):
    """An optimizer whose step calls that of its base class, as many do."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("nested", [False, True])
def test_step_is_counted_once(nested):
    adapter = new_adapter(renewal_steps=100)
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # torch now hooks the step of the base class too
    optimizer = (NestedAdam if nested else torch.optim.Adam)([adapter.values])
    for steps in (1, 2, 3):
        optimizer.zero_grad()
        adapter.add_delta(torch.zeros(3, 6), torch.randn(3, 8)).sum().backward()
        optimizer.step()
        assert adapter.num_steps == steps


def test_what_is_derived_follows_data_that_has_been_replaced():
    """As FSDP2 moves buffers to a GPU."""
    adapter = new_adapter()
    indices = adapter.indices
    adapter.slots.data = adapter.slots.flip(0)
    adapter.steps.data = torch.tensor([3])
    assert torch.equal(adapter.indices, indices.flip(0))
    assert adapter.num_steps == 3
