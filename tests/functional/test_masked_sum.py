"""`masked_sum`: a parameter plus its deltas, whose gradients are masked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masked_layer_tools import EXACT, LiteralMask, Problem, assert_same
from torch.nn import functional as F

from peft_sparsegrad.functional.masked_layer import Delta, masked_sum


def sum_deltas(*shape: int) -> list[Delta]:
    generator = torch.Generator().manual_seed(1)
    return [
        Delta(
            torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(),
            LiteralMask(torch.bernoulli(torch.full(shape, 0.5, dtype=torch.float64), generator=generator) * 2),
        )
        for _ in range(2)
    ]


def layer_norm(parameter: torch.Tensor) -> torch.Tensor:
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return F.layer_norm(x, (4,), parameter, None, 1e-5).sin()


def layer_norm_bias(parameter: torch.Tensor) -> torch.Tensor:
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return F.layer_norm(x, (4,), None, parameter, 1e-5).sin()


def embedding(parameter: torch.Tensor) -> torch.Tensor:
    return F.embedding(torch.tensor([[0, 3, 3], [7, 1, 0]]), parameter).sin()


SUMS = pytest.mark.parametrize(
    ("module", "shape"), [(layer_norm, (4,)), (layer_norm_bias, (4,)), (embedding, (9, 4)), (torch.sin, (2, 3, 2, 2))]
)


@SUMS
def test_sum_is_that_of_autograd_masked_afterwards(module, shape):
    parameter, deltas = torch.randn(shape, dtype=torch.float64), sum_deltas(*shape)
    total, plain = masked_sum(parameter, deltas), parameter + deltas[0].value + deltas[1].value
    torch.testing.assert_close(total, plain, **EXACT)
    values = [delta.value for delta in deltas]
    gradients = torch.autograd.grad(module(total).sum(), values)
    unmasked = torch.autograd.grad(module(plain).sum(), values)
    assert_same(gradients, [g * delta.mask.factors for g, delta in zip(unmasked, deltas, strict=True)])


@SUMS
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("resting", [(0,), (1,), (0, 1)])
def test_sum_with_a_delta_that_does_not_train(module, shape, resting, zeros):
    parameter, deltas = torch.randn(shape, dtype=torch.float64), sum_deltas(*shape)
    values = [delta.value for delta in deltas]
    expected = list(torch.autograd.grad(module(masked_sum(parameter, deltas)).sum(), values))
    for i in resting:
        expected[i] = torch.zeros(shape, dtype=torch.float64) if zeros else None
    deltas = [replace(delta, trains=i not in resting, zeros=zeros) for i, delta in enumerate(deltas)]
    gradients = torch.autograd.grad(module(masked_sum(parameter, deltas)).sum(), values, allow_unused=True)
    assert_same(gradients, expected)


def test_sum_of_one_delta_that_requires_no_gradient():
    parameter, (first, second) = torch.randn(4, dtype=torch.float64), sum_deltas(4)
    first.value.requires_grad_(False)
    masked_sum(parameter, [replace(first, zeros=True), second]).sum().backward()
    assert first.value.grad is None
    assert torch.equal(second.value.grad, second.mask.factors)


def test_sum_leaves_its_terms_alone_and_gives_the_parameter_no_gradient():
    parameter, deltas = torch.randn(4, dtype=torch.float64, requires_grad=True), sum_deltas(4)
    before = [tensor.detach().clone() for tensor in (parameter, *(delta.value for delta in deltas))]
    masked_sum(parameter, deltas).sin().sum().backward()
    assert parameter.grad is None
    assert_same([parameter.detach(), *(delta.value.detach() for delta in deltas)], before)


def test_sum_keeps_nothing_for_the_backward_pass():
    parameter, deltas, kept = torch.randn(4, dtype=torch.float64), sum_deltas(4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_sum(parameter, deltas)
    assert not kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sum_has_the_dtype_of_the_parameter_and_gradients_that_of_the_delta(dtype):
    value = torch.randn(4, requires_grad=True)
    seen = []
    total = masked_sum(torch.randn(4).to(dtype), [Delta(value, lambda g: seen.append(g) or g)])
    assert total.dtype == dtype
    total.sum().backward()
    assert value.grad.dtype == seen[0].dtype == torch.float32


def test_a_second_derivative_of_a_sum_is_refused():
    (delta, *_), dy = Problem("linear").weight_deltas, torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    total = masked_sum(torch.zeros(6, 7, dtype=torch.float64), [delta])
    (gradient,) = torch.autograd.grad(total, delta.value, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("resting", [(), (0,), (1,)])
def test_masking_a_sum_in_place_does_not_reach_the_incoming_gradient(resting):
    p = Problem("linear")
    deltas = [replace(delta, trains=i not in resting) for i, delta in enumerate(p.weight_deltas)]
    other, dy = torch.zeros_like(p.weight, requires_grad=True), torch.randn_like(p.weight)
    before = dy.clone()
    total = masked_sum(p.weight, deltas)
    total.retain_grad()
    (total + other).backward(dy)
    assert torch.equal(dy, before)
    assert torch.equal(other.grad, before)
    assert torch.equal(total.grad, before)
