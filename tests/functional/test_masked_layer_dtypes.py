"""`masked_layer` in bfloat16, with operands of several dtypes, and under autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masked_layer_tools import FEW_CASES, Problem

from peft_sparsegrad.functional.masked_layer import Delta, LinearOperation, masked_layer


@FEW_CASES
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_float32_deltas_on_layers_of_other_dtypes(case, x_dtype, weight_dtype):
    exact = Problem(case)
    expected = [exact.naive(), *exact.expected()]
    p = Problem(case)
    p.x, p.dy = p.x.detach().to(x_dtype).requires_grad_(), p.dy.to(x_dtype)
    p.weight, p.bias = p.weight.to(weight_dtype), p.bias.to(weight_dtype)
    p.weight_deltas, p.bias_deltas = (
        [replace(d, value=d.value.detach().float().requires_grad_()) for d in deltas]
        for deltas in (p.weight_deltas, p.bias_deltas)
    )
    output = p.ours()
    got = [output, *p.gradients(output)]
    assert [t.dtype for t in got] == [x_dtype, x_dtype] + [torch.float32] * 4
    assert all(gradient.dtype == torch.float32 for delta in p.deltas for gradient in delta.mask.seen)
    for tensor, reference in zip(got, expected, strict=True):
        assert (tensor.double() - reference).norm() <= 0.02 * reference.norm()


def test_a_small_delta_is_added_before_rounding():
    """A delta below half a bfloat16 step of the weight is not lost to a float32 input."""
    weight, value = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 1e-3, requires_grad=True)
    x = torch.ones(1, 1, requires_grad=True)
    y = masked_layer(LinearOperation(), x, weight, None, [Delta(value, lambda g: g)])
    assert y.item() == pytest.approx(1.001, rel=1e-6)
    y.sum().backward()
    assert x.grad.item() == pytest.approx(1.001, rel=1e-6)


def test_the_sum_is_rounded_only_once():
    """1.003 and 0.003 are 1.0078 in bfloat16, but 1 if the weight is rounded to 1 first."""
    weight, value = torch.full((1, 1), 1.003), torch.full((1, 1), 3e-3, requires_grad=True)
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    y = masked_layer(LinearOperation(), x, weight, None, [Delta(value, lambda g: g)])
    assert y.item() == 1.0078125
    y.sum().backward()
    assert x.grad.item() == 1.0078125


def mixed_precision_problem(case: str, x_dtype: torch.dtype) -> Problem:
    """All in float32 but x."""
    p = Problem(case)
    p.x = p.x.detach().to(x_dtype).requires_grad_()
    p.weight, p.bias = p.weight.float(), p.bias.float()
    p.weight_deltas, p.bias_deltas = (
        [replace(d, value=d.value.detach().float().requires_grad_()) for d in deltas]
        for deltas in (p.weight_deltas, p.bias_deltas)
    )
    return p


@FEW_CASES
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_gradients_under_autocast(case, x_dtype, backward_inside):
    exact, p = Problem(case), mixed_precision_problem(case, x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = p.ours()
    p.dy = p.dy.to(output.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_inside):
        gradients = p.gradients(output)
    assert [t.dtype for t in gradients] == [x_dtype] + [torch.float32] * 4
    for tensor, reference in zip([output, *gradients], [exact.naive(), *exact.expected()], strict=True):
        assert (tensor.double() - reference).norm() <= 0.02 * reference.norm()


@FEW_CASES
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_output_has_the_dtype_of_the_input_under_autocast(case, x_dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixed_precision_problem(case, x_dtype).ours().dtype == x_dtype
