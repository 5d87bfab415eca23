from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from peft_sparsegrad.functional.masked_layer import (
    Conv2dOperation,
    Delta,
    LinearOperation,
    masked_layer,
    masked_linear,
    masked_sum,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
GROUPED = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}


def conv(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> tuple[Conv2dOperation, Callable]:
    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)

    return Conv2dOperation(stride, padding, dilation, groups), plain


def conv1d_layout(x, weight, bias):
    """That of transformers.pytorch_utils.Conv1D: weight (in, out)."""
    return x @ weight if bias is None else x @ weight + bias


LINEAR = (LinearOperation(), F.linear)
TRANSPOSED = (LinearOperation(transposed=True), conv1d_layout)
# name: ((operation, the same through autograd), shape of x, of the weight, outputs)
CASES = {
    "linear": (LINEAR, (5, 7), (6, 7), 6),
    "linear, sequences": (LINEAR, (2, 3, 7), (6, 7), 6),
    "linear, one token": (LINEAR, (1, 7), (6, 7), 6),
    "linear, a vector": (LINEAR, (7,), (6, 7), 6),
    "linear, no tokens": (LINEAR, (0, 7), (6, 7), 6),
    "linear, one output": (LINEAR, (2, 3, 7), (1, 7), 1),
    "transposed": (TRANSPOSED, (5, 7), (7, 6), 6),
    "transposed, sequences": (TRANSPOSED, (2, 3, 7), (7, 6), 6),
    "transposed, square": (TRANSPOSED, (4, 6), (6, 6), 6),
    "conv": (conv(), (2, 3, 6, 5), (4, 3, 3, 3), 4),
    "conv, 1x1": (conv(), (2, 3, 4, 4), (4, 3, 1, 1), 4),
    "conv, stride": (conv(stride=(2, 3)), (2, 3, 8, 9), (4, 3, 3, 2), 4),
    "conv, padding": (conv(padding=(1, 2)), (2, 3, 4, 5), (4, 3, 3, 3), 4),
    "conv, dilation": (conv(dilation=(2, 3)), (2, 3, 8, 9), (4, 3, 3, 2), 4),
    "conv, groups": (conv(groups=2), (2, 4, 5, 5), (6, 2, 3, 3), 6),
    "conv, depthwise": (conv(groups=4), (2, 4, 5, 5), (4, 1, 3, 3), 4),
    "conv, all": (conv(**GROUPED), (2, 4, 7, 8), (6, 2, 3, 3), 6),
}
FEW = ["linear, sequences", "transposed, sequences", "conv, all"]
ALL_CASES = pytest.mark.parametrize("case", list(CASES))
FEW_CASES = pytest.mark.parametrize("case", FEW)


@dataclass
class LiteralMask:
    """Multiplies by a stored mask, in place, and keeps count."""

    factors: torch.Tensor
    seen: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.seen.append(gradient)
        return gradient.mul_(self.factors)


class Problem:
    """Random operands in float64, two deltas for the weight and two for the bias, each with a mask of its own."""

    def __init__(self, case: str) -> None:
        (self.operation, self.plain), x_shape, weight_shape, outputs = CASES[case]
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(size, dtype=torch.float64, generator=generator)

        def delta(*size: int) -> Delta:
            factors = torch.bernoulli(torch.full(size, 0.5, dtype=torch.float64), generator=generator) * 2
            return Delta(randn(*size).requires_grad_(), LiteralMask(factors))

        self.x, self.weight, self.bias = randn(*x_shape).requires_grad_(), randn(*weight_shape), randn(outputs)
        self.weight_deltas = [delta(*weight_shape), delta(*weight_shape)]
        self.bias_deltas = [delta(outputs), delta(outputs)]
        self.dy = randn(*self.ours().shape)

    @property
    def deltas(self) -> list[Delta]:
        return [*self.weight_deltas, *self.bias_deltas]

    def ours(self) -> torch.Tensor:
        return masked_layer(self.operation, self.x, self.weight, self.bias, self.weight_deltas, self.bias_deltas)

    def naive(self) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        for delta in self.weight_deltas:
            weight = delta.value if weight is None else weight + delta.value
        for delta in self.bias_deltas:
            bias = delta.value if bias is None else bias + delta.value
        return self.plain(self.x, weight, bias)

    def gradients(self, output: torch.Tensor) -> list[torch.Tensor | None]:
        """Of x and of each delta, as they come."""
        tensors = [self.x, *(delta.value for delta in self.deltas)]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, self.dy, allow_unused=True))
        return [next(found) if tensor.requires_grad else None for tensor in tensors]

    def expected(self) -> list[torch.Tensor | None]:
        """Through autograd, masked afterwards."""
        dx, *unmasked = self.gradients(self.naive())
        masked = zip(self.deltas, unmasked, strict=True)
        return [dx, *(None if g is None else g * delta.mask.factors for delta, g in masked)]


def assert_same(tensors, references, **tolerance) -> None:
    for tensor, reference in zip(tensors, references, strict=True):
        assert (tensor is None) == (reference is None)
        if tensor is not None:
            torch.testing.assert_close(tensor, reference, **(tolerance or EXACT))


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


def test_what_a_convolution_returns_may_be_modified_in_place():
    p = Problem("conv, all")
    assert_same(p.gradients(p.ours().add_(1).mul_(2)), [2 * gradient for gradient in p.expected()])


@LINEAR_CASES
def test_masked_linear_keeps_only_what_there_was_before(case):
    p = Problem(case)
    there = [p.x, p.weight, *(delta.value for delta in p.weight_deltas)]
    assert sorted(kept_storages(lambda: linear(p))) == sorted(map(storage, there))


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


# Numbers of low precision


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


# What is kept and what is not computed


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kept_storages(forward: Callable[[], torch.Tensor]) -> list[int]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(storage(t)) or t, lambda t: t):
        forward()
    return kept


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


@FEW_CASES
@pytest.mark.parametrize("changed", ["x", "weight", "delta"])
def test_a_change_between_forward_and_backward_pass_is_noticed(case, changed):
    p = Problem(case)
    output = p.ours()
    with torch.no_grad():
        {"x": p.x, "weight": p.weight, "delta": p.weight_deltas[0].value}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(p.dy)


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


def test_a_second_derivative_is_refused():
    p = Problem("linear")
    (dx,) = torch.autograd.grad(p.ours(), p.x, p.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_second_derivative_of_a_sum_is_refused():
    (delta, *_), dy = Problem("linear").weight_deltas, torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    total = masked_sum(torch.zeros(6, 7, dtype=torch.float64), [delta])
    (gradient,) = torch.autograd.grad(total, delta.value, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# dy belongs to others too


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


# Sums


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


def test_the_layer_leaves_its_operands_alone():
    p = Problem("linear")
    operands = [p.x, p.weight, p.bias, *(delta.value for delta in p.deltas)]
    before = [tensor.detach().clone() for tensor in operands]
    p.ours().backward(p.dy)
    assert_same([tensor.detach() for tensor in operands], before)
