"""Transition matrices and supports by themselves: copies for other dtypes, and what follows the module elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch

from peft_sparsegrad.sparsegrad.state import Support, TransitionMatrices

CPU = torch.device("cpu")
RANKS = pytest.mark.parametrize("ranks", [(3, 4), (None, 4), (3, None)], ids=str)


def columns_for(ranks) -> dict[str, torch.Tensor | None]:
    """Columns of U and V for a weight (6, 8)."""
    r_out, r_in = ranks
    return {"U": None if r_in is None else torch.randn(8, r_in), "V": None if r_out is None else torch.randn(6, r_out)}


def filled(ranks) -> tuple[TransitionMatrices, dict[str, torch.Tensor | None]]:
    """Matrices of a weight (6, 8), and the columns that were filled in."""
    group = TransitionMatrices(6, 8, ranks)
    columns = columns_for(ranks)
    group.fill(**columns)
    return group, columns


@RANKS
def test_fill_is_in_place_and_the_identity_stays(ranks):
    group = TransitionMatrices(6, 8, ranks)
    held = {name: getattr(group, name) for name in "UV"}
    columns = columns_for(ranks)
    for name, rank, features in (("U", ranks[1], 8), ("V", ranks[0], 6)):
        assert (held[name] is None) == (rank is None)
        assert rank is None or torch.equal(held[name], torch.eye(features, rank))
    group.fill(**columns)
    for name, expected in columns.items():
        assert getattr(group, name) is held[name]
        assert expected is None or torch.equal(held[name], expected)


@pytest.mark.parametrize("name", ["U", "V"])
def test_fill_refuses_columns_for_the_identity_and_the_identity_for_columns(name):
    ranks = (None, 4) if name == "V" else (3, None)
    group, columns = filled(ranks)
    with pytest.raises(ValueError, match=f"{name} is the identity on one side and has columns on the other"):
        group.fill(**{**columns, name: torch.randn(8 if name == "U" else 6, 2)})
    both, _ = filled((3, 4))
    with pytest.raises(ValueError, match=f"{name} is the identity"):
        both.fill(**{"U": torch.randn(8, 4), "V": torch.randn(6, 3), name: None})


@RANKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copies_in_another_dtype_are_kept_until_the_columns_change(ranks, dtype):
    group, columns = filled(ranks)
    assert group.on(CPU, torch.float32) == (group.U, group.V)
    first = group.on(CPU, dtype)
    for got, expected in zip(first, columns.values(), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected.to(dtype))
        assert got is None or got.dtype == dtype
    assert all(a is b for a, b in zip(group.on(CPU, dtype), first, strict=True)), "no second copy"
    assert {matrix.dtype for matrix in group.on(CPU, torch.float16) if matrix is not None} == {torch.float16}
    assert all(a is b for a, b in zip(group.on(CPU, dtype), first, strict=True)), "one for each dtype"
    doubled = {name: None if matrix is None else 2 * matrix for name, matrix in columns.items()}

    def follows(expected):
        for got, matrix in zip(group.on(CPU, dtype), expected.values(), strict=True):
            assert matrix is None or torch.equal(got, matrix.to(dtype))

    group.fill(**doubled)
    follows(doubled)
    group.load_state_dict({name: matrix for name, matrix in columns.items() if matrix is not None})
    follows(columns)
    for name, matrix in doubled.items():
        setattr(group, name, matrix)  # as `assign=True` and a move to another device do
    follows(doubled)
    assert not copy.deepcopy(group)._replicas


def test_sum_follows_the_support_to_its_device_and_stays_float32():
    support = Support((3, 4), 5, dynamic=False, settled=True, regrows=True)
    support.core_sum += 1
    summed = support.core_sum
    assert support.to(torch.float64).core_sum is summed
    assert summed.dtype == torch.float32
    support.to("meta")
    assert support.core_sum.is_meta
    support.to_empty(device="cpu")
    assert support.core_sum.device == CPU
    assert torch.equal(support.core_sum, torch.zeros(3, 4))


@pytest.mark.parametrize(("dynamic", "regrows"), [(True, False), (False, False)])
def test_support_that_does_not_grow_back_has_no_sum(dynamic, regrows):
    support = Support((3, 4), 5, dynamic=dynamic, settled=True, regrows=regrows)
    assert support.to("cpu").core_sum is None
    support.load_state_dict(support.state_dict())
    assert support.core_sum is None


def test_steps_are_in_the_state_dict_and_the_sum_is_not():
    support = Support((3, 4), 5, dynamic=False, settled=True, regrows=True)
    support.steps = 7
    support.core_sum += 1
    state = {key: tensor.clone() for key, tensor in support.state_dict().items()}
    assert sorted(state) == ["counted", "packed", "settled"]
    other = Support((3, 4), 5, dynamic=False, settled=True, regrows=True)
    other.core_sum += 1
    other.load_state_dict(state)
    assert other.steps == 7
    assert not other.core_sum.any()
