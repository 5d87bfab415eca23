"""`masked_linear`: a linear layer in one function, with the results of autograd, masked afterwards."""

from __future__ import annotations

import pytest
import torch
from masked_layer_tools import CASES, EXACT, Problem, assert_same, kept_storages, storage

from peft_sparsegrad.functional.masked_layer import masked_linear


def linear(p: Problem) -> torch.Tensor:
    transposed = p.operation.transposed
    return masked_linear(p.x, p.weight, p.bias, p.weight_deltas, p.bias_deltas, transposed)


LINEAR_CASES = pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("conv")])


@LINEAR_CASES
def test_masked_linear(case):
    p = Problem(case)
    torch.testing.assert_close(linear(p), p.naive(), **EXACT)
    assert_same(p.gradients(linear(p)), p.expected())


@LINEAR_CASES
def test_masked_linear_without_a_weight_and_bias(case):
    p = Problem(case)
    p.weight, p.bias, p.bias_deltas = None, None, []
    torch.testing.assert_close(linear(p), p.naive(), **EXACT)
    assert_same(p.gradients(linear(p)), p.expected())


@LINEAR_CASES
def test_masked_linear_of_an_input_with_gaps(case):
    p = Problem(case)
    p.x = p.x.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
    assert_same(p.gradients(linear(p)), p.expected())


@LINEAR_CASES
def test_what_masked_linear_returns_may_be_modified_in_place(case):
    p = Problem(case)
    output = linear(p)
    output += 1
    assert_same(p.gradients(output.mul_(2)), [2 * gradient for gradient in p.expected()])


@LINEAR_CASES
def test_masked_linear_keeps_only_what_there_was_before(case):
    p = Problem(case)
    there = [p.x, p.weight, *(delta.value for delta in p.weight_deltas)]
    assert sorted(kept_storages(lambda: linear(p))) == sorted(map(storage, there))
