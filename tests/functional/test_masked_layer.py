"""`masked_layer`: output and gradients are those of autograd, masked afterwards."""

from dataclasses import replace

import pytest
import torch
from masked_layer_tools import ALL_CASES, EXACT, FEW_CASES, Problem, assert_same
from torch.autograd import gradcheck

from peft_sparsegrad.functional.masked_layer import Delta, masked_layer


@ALL_CASES
def test_output_and_gradients_are_those_of_autograd_masked_afterwards(case):
    p = Problem(case)
    torch.testing.assert_close(p.ours(), p.naive(), **EXACT)
    assert_same(p.gradients(p.ours()), p.expected())


@ALL_CASES
def test_without_a_bias(case):
    p = Problem(case)
    p.bias, p.bias_deltas = None, []
    torch.testing.assert_close(p.ours(), p.naive(), **EXACT)
    assert_same(p.gradients(p.ours()), p.expected())


@FEW_CASES
def test_a_frozen_bias_without_deltas(case):
    p = Problem(case)
    p.bias_deltas = []
    torch.testing.assert_close(p.ours(), p.naive(), **EXACT)
    assert_same(p.gradients(p.ours()), p.expected())


@FEW_CASES
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_deltas(case, count):
    p = Problem(case)
    more = Problem(case)
    p.weight_deltas = [*p.weight_deltas, more.weight_deltas[0]][:count]
    p.bias_deltas = p.bias_deltas[: count - 1]
    torch.testing.assert_close(p.ours(), p.naive(), **EXACT)
    assert_same(p.gradients(p.ours()), p.expected())


@ALL_CASES
def test_gradcheck_of_the_input_gradient(case):
    p = Problem(case)

    def function(x):
        return masked_layer(p.operation, x, p.weight, p.bias, p.weight_deltas, p.bias_deltas)

    assert gradcheck(function, (p.x,), fast_mode=p.x.dim() == 4)


@FEW_CASES
def test_gradcheck_of_everything_without_masks(case):
    p = Problem(case)

    def function(x, *values):
        deltas = [Delta(value, lambda gradient: gradient) for value in values]
        return masked_layer(p.operation, x, p.weight, p.bias, deltas[:2], deltas[2:])

    assert gradcheck(function, (p.x, *(delta.value for delta in p.deltas)), fast_mode=p.x.dim() == 4)


@FEW_CASES
def test_two_adapters_are_masked_differently(case):
    p = Problem(case)
    _, first, second, *_ = p.gradients(p.ours())
    assert not torch.equal(first, second)
    assert torch.equal(first == 0, p.weight_deltas[0].mask.factors == 0)
    assert torch.equal(second == 0, p.weight_deltas[1].mask.factors == 0)


@FEW_CASES
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("resting", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 3), (0, 1, 2, 3)])
def test_a_delta_that_does_not_train_leaves_the_other_gradients_alone(case, resting, zeros):
    p = Problem(case)
    expected = p.expected()
    deltas = [replace(d, trains=i not in resting, zeros=zeros) for i, d in enumerate(p.deltas)]
    p.weight_deltas, p.bias_deltas = deltas[:2], deltas[2:]
    for i in resting:
        expected[1 + i] = torch.zeros_like(p.deltas[i].value) if zeros else None
    assert_same(p.gradients(p.ours()), expected)
    assert [len(delta.mask.seen) for delta in p.deltas] == [int(i not in resting) for i in range(4)]


@FEW_CASES
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2, 3)])
def test_a_delta_that_requires_no_gradient_gets_none(case, frozen, zeros):
    p = Problem(case)
    for i in frozen:
        p.deltas[i].value.requires_grad_(False)
    p.weight_deltas = [replace(delta, zeros=zeros) for delta in p.weight_deltas]
    expected = p.expected()
    assert_same(p.gradients(p.ours()), expected)
    assert [gradient is None for gradient in expected[1:]] == [i in frozen for i in range(4)]
    assert [len(delta.mask.seen) for delta in p.deltas] == [int(i not in frozen) for i in range(4)]


@FEW_CASES
def test_an_input_that_requires_no_gradient(case):
    p = Problem(case)
    expected = p.expected()[1:]
    p.x.requires_grad_(False)
    dx, *gradients = p.gradients(p.ours())
    assert dx is None
    assert_same(gradients, expected)


def test_nothing_requires_a_gradient():
    p = Problem("linear")
    for tensor in (p.x, *(delta.value for delta in p.deltas)):
        tensor.requires_grad_(False)
    assert not p.ours().requires_grad
    torch.testing.assert_close(p.ours(), p.naive(), **EXACT)


@FEW_CASES
def test_the_frozen_weight_and_bias_get_no_gradient(case):
    p = Problem(case)
    p.weight.requires_grad_()
    p.bias.requires_grad_()
    p.ours().backward(p.dy)
    assert p.weight.grad is None
    assert p.bias.grad is None


@ALL_CASES
@pytest.mark.parametrize("with_bias", [True, False])
def test_without_a_weight_only_what_the_deltas_add_is_computed(case, with_bias):
    p = Problem(case)
    if not with_bias:
        p.bias, p.bias_deltas = None, []
    merged, expected = p.naive(), p.expected()
    base = p.plain(p.x, p.weight, p.bias)
    p.weight, p.bias = None, None
    additive = base + p.ours()
    torch.testing.assert_close(additive, merged, **EXACT)
    assert_same(p.gradients(additive), expected)


def test_a_second_derivative_is_refused():
    p = Problem("linear")
    (dx,) = torch.autograd.grad(p.ours(), p.x, p.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
