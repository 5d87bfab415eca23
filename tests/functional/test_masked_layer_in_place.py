"""Masks write in place in memory of their own, and reach no tensor that others hold too."""

from dataclasses import replace

import pytest
import torch
from masked_layer_tools import ALL_CASES, FEW_CASES, Problem, assert_same


@FEW_CASES
@pytest.mark.parametrize("layout", ["x", "dy", "both", "expanded dy", "weight", "channels last"])
def test_memory_layouts(case, layout):
    p = Problem(case)

    def transposed(tensor):
        requires_grad = tensor.requires_grad
        tensor = tensor.detach().transpose(0, -1).contiguous().transpose(0, -1)
        return tensor.requires_grad_(requires_grad)

    if layout in ("x", "both"):
        p.x = transposed(p.x)
    if layout in ("dy", "both"):
        p.dy = transposed(p.dy)
    if layout == "weight":
        p.weight = transposed(p.weight)
    if layout == "expanded dy":
        p.dy = torch.ones((), dtype=torch.float64).expand(p.dy.shape)
    if layout == "channels last" and p.x.dim() == 4:
        p.x = p.x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert_same(p.gradients(p.ours()), p.expected())


@ALL_CASES
def test_masks_get_contiguous_memory_of_their_own(case):
    p = Problem(case)
    if p.x.dim() == 4:
        p.x = p.x.detach().to(memory_format=torch.channels_last).requires_grad_()
        p.dy = p.dy.to(memory_format=torch.channels_last)
    p.gradients(p.ours())
    seen = [gradient for delta in p.deltas for gradient in delta.mask.seen]
    assert len(seen) == 4
    for delta, gradient in zip(p.deltas, seen, strict=True):
        assert gradient.is_contiguous()
        assert gradient.shape == delta.value.shape
    assert len({gradient.untyped_storage().data_ptr() for gradient in (*seen, p.dy, p.x) if gradient.numel()}) == (
        6 if p.x.numel() else 4
    )


@FEW_CASES
def test_the_mask_may_return_other_memory(case):
    p = Problem(case)
    expected = p.expected()
    p.weight_deltas = [replace(d, mask=lambda g, m=d.mask: g * m.factors) for d in p.weight_deltas]
    assert_same(p.gradients(p.ours()), expected)


@FEW_CASES
def test_masks_are_drawn_anew_in_each_backward_pass(case):
    p = Problem(case)
    output = p.ours()
    assert not any(delta.mask.seen for delta in p.deltas)
    first = torch.autograd.grad(output, p.weight_deltas[0].value, p.dy, retain_graph=True)[0].clone()
    p.weight_deltas[0].mask.factors = 2 - p.weight_deltas[0].mask.factors
    second = torch.autograd.grad(output, p.weight_deltas[0].value, p.dy, retain_graph=True)[0]
    assert torch.equal(first == 0, second != 0)


def test_what_a_convolution_returns_may_be_modified_in_place():
    p = Problem("conv, all")
    assert_same(p.gradients(p.ours().add_(1).mul_(2)), [2 * gradient for gradient in p.expected()])


@FEW_CASES
@pytest.mark.parametrize("changed", ["x", "weight", "delta"])
def test_a_change_between_forward_and_backward_pass_is_noticed(case, changed):
    p = Problem(case)
    output = p.ours()
    with torch.no_grad():
        {"x": p.x, "weight": p.weight, "delta": p.weight_deltas[0].value}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(p.dy)


@ALL_CASES
def test_masking_in_place_does_not_reach_the_incoming_gradient(case):
    p = Problem(case)
    expected, dy = p.expected(), p.dy.clone()
    other = torch.zeros_like(p.dy, requires_grad=True)
    output = p.ours()
    output.retain_grad()
    (output + other).backward(p.dy)
    assert torch.equal(p.dy, dy)
    assert torch.equal(other.grad, dy)
    assert torch.equal(output.grad, dy)
    assert_same([p.x.grad, *(delta.value.grad for delta in p.deltas)], expected)


def test_the_layer_leaves_its_operands_alone():
    p = Problem("linear")
    operands = [p.x, p.weight, p.bias, *(delta.value for delta in p.deltas)]
    before = [tensor.detach().clone() for tensor in operands]
    p.ours().backward(p.dy)
    assert_same([tensor.detach() for tensor in operands], before)
