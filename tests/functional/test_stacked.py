"""Deltas on the stacked weights of experts against loops over the experts, in float64."""

import pytest
import torch

from peft_sparsegrad.functional import (
    Core,
    ExactHosvd,
    LinearGradient,
    SketchedHosvd,
    StackedGradient,
    observe_weight_gradient,
    select_support,
    select_supports,
    stacked_core_gradient,
    stacked_delta,
    stacked_sum,
)

E, OUT, IN = 3, 6, 5
COLUMNS = torch.tensor([0, 2, 3], dtype=torch.int32)  # in place of a matrix U with three columns
RANKS = [(None, None), (4, None), (None, 3), (4, 3), (6, 5), (None, COLUMNS)]


def orthonormal(rows, columns):
    return None if columns is None else torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def make_core(ranks, k=7, leaf=False, experts=E):
    U = COLUMNS if ranks[1] is COLUMNS else orthonormal(IN, ranks[1])
    r_out, r_in = OUT if ranks[0] is None else ranks[0], IN if U is None else U.shape[-1]
    shape = (experts * r_out, r_in)
    values = torch.randn(experts * k, dtype=torch.float64, requires_grad=True)
    indices = torch.cat([torch.randperm(r_out * r_in)[:k].sort().values + e * r_out * r_in for e in range(experts)])
    made = torch.zeros(shape, dtype=torch.float64, requires_grad=True) if leaf else None
    return Core(values, indices, U, orthonormal(OUT, ranks[0]), shape, made, in_features=IN)


def slow_delta(core, experts=E):
    """Each expert by itself, with plain products that autograd can follow."""
    S = torch.zeros(core.shape, dtype=torch.float64).flatten().index_put((core.indices,), core.values).view(core.shape)
    U = torch.eye(IN, dtype=torch.float64) if core.U is None else core.U
    U = torch.eye(IN, dtype=torch.float64)[:, U] if core.U is COLUMNS else U
    V = torch.eye(OUT, dtype=torch.float64) if core.V is None else core.V
    return torch.stack([V @ part @ U.T for part in S.chunk(experts)])


@pytest.mark.parametrize("ranks", RANKS)
def test_sum_and_its_gradient_are_those_of_a_loop(ranks):
    core, weight = make_core(ranks), torch.randn(E, OUT, IN, dtype=torch.float64)
    dy = torch.randn_like(weight)
    fast, slow = stacked_sum(weight, core, E), weight + slow_delta(core)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(stacked_delta(core, E, torch.float64), slow_delta(core))
    (own,) = torch.autograd.grad(fast, core.values, dy)
    torch.testing.assert_close(own, torch.autograd.grad(slow, core.values, dy)[0])


def test_weight_without_experts_is_one_expert():
    core, weight = make_core((4, 3), experts=1), torch.randn(OUT, IN, dtype=torch.float64)
    fast = stacked_sum(weight, core, 1)
    torch.testing.assert_close(fast, weight + slow_delta(core, 1)[0])
    assert fast.shape == weight.shape


def test_leaf_receives_the_gradient_of_all_cores_and_a_trained_weight_its_own():
    core = make_core((4, 3), leaf=True)
    weight, dy = torch.randn(2, E, OUT, IN, dtype=torch.float64)
    weight.requires_grad_()
    leaf, own = torch.autograd.grad(stacked_sum(weight, core, E), [core.leaf, weight], dy)
    torch.testing.assert_close(leaf, torch.cat([core.V.T @ each @ core.U for each in dy]))
    torch.testing.assert_close(own, dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sum_keeps_the_weights_dtype_under_autocast(dtype):
    core, weight = make_core((4, 3)), torch.randn(E, OUT, IN).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = stacked_sum(weight, core, E)
    assert found.dtype == dtype
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, (weight.double() + slow_delta(core)).to(dtype), **tolerance)


@pytest.mark.parametrize("usable", [True, False])
def test_observer_sees_the_gradient_and_the_values_rest(usable):
    values, weight, seen = torch.zeros(4, requires_grad=True), torch.randn(E, OUT, IN), []
    observed = observe_weight_gradient(weight, values, lambda gradient: seen.append(gradient) or usable, True)
    assert observed.data_ptr() == weight.data_ptr()
    dy = torch.randn_like(weight)
    observed.backward(dy)
    assert torch.equal(seen[0], dy)
    assert values.grad.tolist() == [0.0 if usable else float("inf")] * 4


@pytest.mark.parametrize("kind", [ExactHosvd, SketchedHosvd])
@pytest.mark.parametrize("ranks", [(4, 3), (4, None), (None, 3)])
def test_basis_of_a_stack_is_that_of_the_experts_one_by_one(kind, ranks):
    stack = torch.randn(E, OUT, IN, dtype=torch.float64)
    together, apart = kind(OUT, IN, ranks), kind(OUT, IN, ranks)
    for _ in range(2):
        StackedGradient(stack).add_to(together, lambda tensor: tensor)
        for each in stack:
            LinearGradient(each, torch.eye(OUT, dtype=torch.float64)).add_to(apart, lambda tensor: tensor)
        together.finish_sweep()
        apart.finish_sweep()
    found, wanted = together.result(), apart.result()
    for own, other in ((found.U, wanted.U), (found.V, wanted.V)):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own @ own.T, other @ other.T, atol=1e-4, rtol=1e-4)
    assert found.energy == pytest.approx(wanted.energy, rel=1e-5)


def test_stacked_gradient_is_that_of_the_linear_layers():
    x, dy = torch.randn(E, 9, IN, dtype=torch.float64), torch.randn(E, 9, OUT, dtype=torch.float64)
    U, V = orthonormal(IN, 3), orthonormal(OUT, 4)
    stack = StackedGradient(torch.stack([b.T @ a for a, b in zip(x, dy, strict=True)]))
    layers = [LinearGradient(a, b) for a, b in zip(x, dy, strict=True)]
    torch.testing.assert_close(stack.in_core(U, V), torch.cat([layer.in_core(U, V) for layer in layers]))
    torch.testing.assert_close(stack.energy(), sum(layer.energy() for layer in layers))
    assert stacked_core_gradient(stack.stack, None, None, E).shape == (E * OUT, IN)


def test_supports_are_selected_core_by_core():
    score = torch.rand(E, 20)
    found = select_supports(score, 6)
    assert torch.equal(found, torch.cat([select_support(each, 6) + e * 20 for e, each in enumerate(score)]))
    with pytest.raises(ValueError, match="NaN or Inf"):
        select_supports(torch.full((1, 3), float("nan")), 1)
