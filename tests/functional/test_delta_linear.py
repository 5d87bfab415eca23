"""The layer and its delta in one operation, added to the output or to the weight, against `delta_product`."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import linear

from peft_sparsegrad.functional import Core, delta_linear, delta_product, writing_out_pays

IN, OUT, R_IN, R_OUT = 7, 6, 4, 3
EXACT = {"rtol": 1e-12, "atol": 1e-12}
COLUMNS = torch.tensor([0, 2, 3, 6], dtype=torch.int32)  # in place of a matrix U with R_IN columns
RANKS = pytest.mark.parametrize(
    "ranks", [(None, None), (None, R_IN), (R_OUT, None), (R_OUT, R_IN), (None, COLUMNS), (R_OUT, COLUMNS)], ids=str
)
SHAPES = pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN)], ids=str)


@pytest.fixture(autouse=True, params=[False, True], ids=["on the output", "written out"])
def writes_out(request, monkeypatch):
    monkeypatch.setattr(Problem, "writes_out", request.param, raising=False)
    return request.param


class Problem:
    """Random operands in float64; a third of the core trains, all of it with `dense`."""

    writes_out: bool

    def __init__(self, ranks, shape=(5, IN), dense=False, bias=True) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.float64, generator=generator)

        r_out, r_in = ranks[0], R_IN if ranks[1] is COLUMNS else ranks[1]
        self.core_shape = (r_out or OUT, r_in or IN)
        entries = self.core_shape[0] * self.core_shape[1]
        k = entries if dense else entries // 3
        self.indices = None if dense else torch.randperm(entries, generator=generator)[:k].sort().values
        self.U, self.V = (None if r_in is None else randn(IN, r_in)), (None if r_out is None else randn(OUT, r_out))
        self.U = COLUMNS if ranks[1] is COLUMNS else self.U
        self.weight, self.bias = randn(OUT, IN), (randn(OUT) if bias else None)
        self.x, self.values = randn(*shape).requires_grad_(), randn(k).requires_grad_()
        self.dy = randn(*shape[:-1], OUT)

    def core(self, values, **options) -> Core:
        return Core(values, self.indices, self.U, self.V, self.core_shape, in_features=IN, **options)

    def ours(self, x=None, values=None, **options) -> torch.Tensor:
        x, values = self.x if x is None else x, self.values if values is None else values
        return delta_linear(x, self.weight, self.bias, self.core(values, **options), self.writes_out)

    def twin(self, **options) -> torch.Tensor:
        result = linear(self.x, self.weight, self.bias)
        return delta_product(result, self.x, self.core(self.values, **options))

    def gradients(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(output, [self.x, self.values], self.dy))


@RANKS
@SHAPES
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_the_delta_on_the_output(ranks, shape, dense, bias):
    p = Problem(ranks, shape, dense, bias)
    torch.testing.assert_close(p.ours(), p.twin(), **EXACT)
    for gradient, expected in zip(p.gradients(p.ours()), p.gradients(p.twin()), strict=True):
        torch.testing.assert_close(gradient, expected, **EXACT)


@RANKS
@pytest.mark.parametrize("writes_out", [False], indirect=True)  # in full precision only
def test_under_autocast_it_is_the_output_of_the_two_operations(ranks):
    """The gradient of the input is rounded once, where the twin rounds both of its parts."""
    p = Problem(ranks)
    p.weight, p.bias = p.weight.float(), p.bias.float()
    p.x, p.values = p.x.detach().float().requires_grad_(), p.values.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, twin = p.ours(), p.twin()
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, twin)
    p.dy = p.dy.bfloat16()
    for gradient, expected in zip(p.gradients(ours), p.gradients(twin), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)


@RANKS
@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck(ranks, dense):
    p = Problem(ranks, (2, 3, IN), dense)
    assert gradcheck(lambda x, values: p.ours(x, values), (p.x, p.values))


@RANKS
def test_the_cores_gradient_is_that_of_the_delta(ranks):
    p = Problem(ranks)
    leaves = [torch.zeros((), dtype=torch.float64).expand(p.core_shape).requires_grad_() for _ in range(2)]
    p.ours(leaf=leaves[0]).backward(p.dy)
    p.twin(leaf=leaves[1]).backward(p.dy)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **EXACT)
    assert leaves[0].grad.all()


@RANKS
def test_values_of_zero_change_no_bit(ranks):
    p = Problem(ranks)
    assert torch.equal(p.ours(values=torch.zeros_like(p.values)), linear(p.x, p.weight, p.bias))


@RANKS
def test_what_is_kept_for_the_backward_pass(ranks):
    """The weight itself, and no sum of that size; of the input x U where there is a U."""
    tokens = 11
    p = Problem(ranks, (tokens, IN))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        p.ours()
    assert [t.data_ptr() for t in kept if t.shape == (OUT, IN)] == [p.weight.data_ptr()]
    assert [tuple(t.shape) for t in kept if tokens in t.shape] == [(tokens, p.core_shape[1])]


@RANKS
def test_frozen_values_keep_nothing_that_grows_with_the_tokens(ranks):
    p, kept = Problem(ranks, (11, IN)), []
    p.values.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        output = p.ours()
    assert not [shape for shape in kept if 11 in shape]
    torch.testing.assert_close(torch.autograd.grad(output, p.x, p.dy), torch.autograd.grad(p.twin(), p.x, p.dy))


@pytest.mark.parametrize("frozen", ["x", "values"])
def test_gradients_only_of_what_needs_them(frozen):
    p = Problem((None, R_IN))
    expected = dict(zip(["x", "values"], p.gradients(p.ours()), strict=True))
    getattr(p, frozen).requires_grad_(False)
    p.ours().backward(p.dy)
    for name, gradient in expected.items():
        tensor = getattr(p, name)
        assert tensor.grad is None if name == frozen else torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize(
    ("tokens", "weight_shape", "ranks", "pays"),
    [
        (1024, (3072, 768), (None, 80), False),  # measured: 0.98
        (2048, (3072, 768), (None, 80), True),  # 0.93
        (1024, (768, 3072), (80, None), False),
        (2048, (768, 3072), (80, None), True),
        (1, (768, 3072), (None, None), False),
        (16, (768, 3072), (None, None), True),
        (1024, (768, 3072), (64, 64), False),
        (8192, (768, 3072), (64, 64), True),
    ],
)
def test_pays_where_tokens_are_many_or_the_core_is_the_weight(tokens, weight_shape, ranks, pays):
    assert writing_out_pays(tokens, weight_shape, ranks) is pays


@pytest.mark.parametrize(("weight_shape", "ranks"), [((3072, 768), (None, 96)), ((576, 1536), (None, 184))])
def test_pays_from_fewer_tokens_where_columns_are_chosen(weight_shape, ranks):
    assert not writing_out_pays(64, weight_shape, ranks, selects=True)  # measured: 1.45 and 1.03
    assert writing_out_pays(1024, weight_shape, ranks, selects=True)  # 0.96 and 0.85
    assert not writing_out_pays(1024, weight_shape, ranks)
