"""What `masked_layer` keeps for the backward pass, and what it does not compute there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masked_layer_tools import ALL_CASES, FEW_CASES, Problem, kept_storages, storage

from peft_sparsegrad.functional.masked_layer import Delta


@ALL_CASES
def test_only_what_there_was_before_is_kept(case):
    p = Problem(case)
    there = [p.x, p.weight, *(delta.value for delta in p.weight_deltas)]
    assert sorted(kept_storages(p.ours)) == sorted(map(storage, there))


@FEW_CASES
def test_without_a_weight_x_and_the_deltas_are_kept(case):
    p = Problem(case)
    p.weight = None
    assert sorted(kept_storages(p.ours)) == sorted(map(storage, [p.x, *(delta.value for delta in p.weight_deltas)]))


@FEW_CASES
@pytest.mark.parametrize("why", ["trains", "requires_grad", "each for its own reason"])
def test_x_is_not_kept_where_no_weight_delta_trains(case, why):
    p = Problem(case)
    for i, delta in enumerate(p.weight_deltas):
        if why == "trains" or (i == 0 and why != "requires_grad"):
            p.weight_deltas[i] = replace(delta, trains=False)
        else:
            delta.value.requires_grad_(False)
    assert sorted(kept_storages(p.ours)) == sorted(
        map(storage, [p.weight, *(delta.value for delta in p.weight_deltas)])
    )


@FEW_CASES
@pytest.mark.parametrize("resting", [0, 1])
def test_x_is_kept_where_one_delta_trains(case, resting):
    p = Problem(case)
    p.weight_deltas[resting] = replace(p.weight_deltas[resting], trains=False)
    assert storage(p.x) in kept_storages(p.ours)


@FEW_CASES
def test_nothing_else_hangs_on_the_graph(case):
    p = Problem(case)
    p.x.requires_grad_(False)
    held = torch.utils._pytree.tree_leaves(p.ours().grad_fn.__dict__)
    assert [value for value in held if isinstance(value, Delta)] == p.deltas
    assert not [value for value in held if isinstance(value, torch.Tensor)]


class Counting:
    """Another operation, with a count of the calls of each of its parts."""

    def __init__(self, operation) -> None:
        self.operation, self.calls = operation, []

    def __getattr__(self, name: str):
        self.calls.append(name)
        return getattr(self.operation, name)


@FEW_CASES
@pytest.mark.parametrize(
    ("x_needs", "resting", "calls"),
    [
        (True, (), {"input_gradient", "weight_gradient", "bias_gradient"}),
        (True, (0, 2), {"input_gradient", "weight_gradient", "bias_gradient"}),
        (True, (0, 1), {"input_gradient", "bias_gradient"}),
        (True, (2, 3), {"input_gradient", "weight_gradient"}),
        (True, (0, 1, 2, 3), {"input_gradient"}),
        (False, (0, 1), {"bias_gradient"}),
        (False, (2, 3), {"weight_gradient"}),
        (False, (0, 1, 2, 3), set()),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_only_what_is_needed_is_computed_and_once(case, x_needs, resting, calls, zeros, frozen):
    p = Problem(case)
    p.x.requires_grad_(x_needs)
    deltas = [replace(d, trains=frozen or i not in resting, zeros=zeros) for i, d in enumerate(p.deltas)]
    if frozen:
        for i in resting:
            deltas[i].value.requires_grad_(False)
    p.weight_deltas, p.bias_deltas = deltas[:2], deltas[2:]
    p.operation = Counting(p.operation)
    output = p.ours()
    assert p.operation.calls == ["forward"]
    if output.requires_grad:
        output.backward(p.dy)
    assert sorted(p.operation.calls) == sorted(["forward", *calls])
