from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from peft_sparsegrad.functional import Core, delta_product, delta_weight, observe_gradient

IN, OUT, CORE = 7, 6, (3, 4)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Problem:
    """Random operands in float64. `kind`: "support" (5 of 12 entries), "dense" (no indices), "identity" (no U, V; 12
    entries), "columns" (U is a choice of columns, no V; 12 entries)."""

    def __init__(self, kind: str = "support", shape: tuple[int, ...] = (5,)) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.float64, generator=generator)

        self.core_shape = {"identity": (OUT, IN), "columns": (OUT, CORE[1])}.get(kind, CORE)
        entries = self.core_shape[0] * self.core_shape[1]
        k = {"support": 5, "dense": entries, "identity": 12, "columns": 12}[kind]
        self.indices = None if kind == "dense" else torch.randperm(entries, generator=generator)[:k].sort().values
        self.values = randn(k).requires_grad_()
        self.U = None if kind == "identity" else randn(IN, CORE[1])
        self.V = None if kind in ("identity", "columns") else randn(OUT, CORE[0])
        self.matrix = self.U
        if kind == "columns":
            self.U = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
            self.matrix = torch.eye(IN, dtype=torch.float64)[:, self.U]
        self.x, self.result = randn(*shape, IN).requires_grad_(), randn(*shape, OUT).requires_grad_()
        self.dy = randn(*shape, OUT)

    def core(self, **options) -> Core:
        return Core(self.values, self.indices, self.U, self.V, self.core_shape, in_features=IN, **options)

    def ours(self, skip_zeros: bool = False, **options) -> torch.Tensor:
        return delta_product(self.result, self.x, self.core(**options), skip_zeros)

    def weight(self) -> torch.Tensor:
        """V S Uᵀ, through autograd."""
        indices = torch.arange(self.values.numel()) if self.indices is None else self.indices
        core = torch.zeros(self.core_shape[0] * self.core_shape[1], dtype=torch.float64)
        core = core.scatter(0, indices, self.values).view(self.core_shape)
        U = torch.eye(IN, dtype=torch.float64) if self.matrix is None else self.matrix
        V = torch.eye(OUT, dtype=torch.float64) if self.V is None else self.V
        return V @ core @ U.T

    def gradients(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(output, [self.result, self.x, self.values], self.dy))


KINDS = pytest.mark.parametrize("kind", ["support", "dense", "identity", "columns"])


@KINDS
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,), (2, 1, 3)])
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_output_and_gradients_are_those_of_autograd(kind, shape, skip_zeros):
    problem = Problem(kind, shape)
    ours, naive = problem.ours(skip_zeros=skip_zeros), problem.result + problem.x @ problem.weight().T
    torch.testing.assert_close(ours, naive, **EXACT)
    for gradient, expected in zip(problem.gradients(ours), problem.gradients(naive), strict=True):
        torch.testing.assert_close(gradient, expected, **EXACT)


@KINDS
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_gradcheck(kind, skip_zeros):
    p = Problem(kind, (2, 3))

    def function(result, x, values):
        return delta_product(result, x, p.core()._replace(values=values), skip_zeros)

    assert gradcheck(function, (p.result, p.x, p.values))


@KINDS
def test_delta_weight(kind):
    problem = Problem(kind)
    ours = delta_weight(problem.core())
    torch.testing.assert_close(ours, problem.weight(), **EXACT)
    assert ours.shape == (OUT, IN)


def test_no_tokens():
    problem = Problem(shape=(0,))
    gradients = problem.gradients(problem.ours())
    assert gradients[1].shape == (0, IN)
    assert torch.equal(gradients[2], torch.zeros_like(problem.values))


def test_skip_zeros_where_most_tokens_have_no_gradient():
    problem = Problem(shape=(20,))
    problem.dy[3:17] = 0
    expected, gradients = problem.gradients(problem.ours()), problem.gradients(problem.ours(skip_zeros=True))
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, **EXACT)
    problem.dy.zero_()
    assert not problem.gradients(problem.ours(skip_zeros=True))[2].any()


@pytest.mark.parametrize("frozen", ["result", "x", "values"])
def test_gradients_only_of_what_needs_them(frozen):
    problem = Problem()
    expected = dict(zip(["result", "x", "values"], problem.gradients(problem.ours()), strict=True))
    getattr(problem, frozen).requires_grad_(False)
    problem.ours().backward(problem.dy)
    for name, gradient in expected.items():
        tensor = getattr(problem, name)
        assert tensor.grad is None if name == frozen else torch.equal(tensor.grad, gradient)


def saved_shapes(problem: Problem) -> list[tuple[int, ...]]:
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        problem.ours()
    return shapes


def test_x_is_not_kept_for_the_backward_pass():
    tokens = 11
    shapes = saved_shapes(Problem(shape=(tokens,)))
    assert (tokens, CORE[1]) in shapes, "x U is what the values' gradient needs"
    assert not [shape for shape in shapes if tokens in shape and shape != (tokens, CORE[1])]


def test_frozen_values_keep_nothing_that_grows_with_the_tokens():
    problem = Problem(shape=(11,))
    problem.values.requires_grad_(False)
    assert not [shape for shape in saved_shapes(problem) if 11 in shape]


def test_full_weight_gradient_is_never_formed():
    problem = Problem(shape=(11,))
    shapes = set()

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.update(tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Shapes():
        problem.ours().backward(problem.dy)
    assert CORE in shapes
    assert not shapes & {(OUT, IN), (IN, OUT)}


@pytest.mark.parametrize("kind", ["support", "dense", "identity"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_result_with_float32_values(kind, x_dtype):
    exact = Problem(kind, (2, 8))
    expected = [exact.ours(), *exact.gradients(exact.ours())]
    p = Problem(kind, (2, 8))
    p.result = p.result.detach().bfloat16().requires_grad_()
    p.x, p.values = p.x.detach().to(x_dtype).requires_grad_(), p.values.detach().float().requires_grad_()
    if p.U is not None:
        p.U, p.V = p.U.bfloat16(), p.V.bfloat16()
    p.dy = p.dy.bfloat16()
    output = p.ours()
    got = [output, *p.gradients(output)]
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, x_dtype, torch.float32]
    for tensor, reference in zip(got, expected, strict=True):
        assert (tensor.double() - reference).norm() <= 0.02 * reference.norm()


# The gradient of the whole core, by which a support is renewed.


def new_leaf(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros((), dtype=dtype).expand(shape).requires_grad_()


@KINDS
@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("frozen", [(), ("x",), ("result", "x")], ids=str)
def test_leaf_receives_the_cores_gradient_and_changes_no_other(kind, skip_zeros, frozen):
    p = Problem(kind, (2, 3))
    for name in frozen:
        getattr(p, name).requires_grad_(False)
    leaf, expected = new_leaf(p.core_shape), torch.zeros(p.core_shape, dtype=torch.float64)
    for factor in (1.0, -0.5, 3.0):
        core = torch.randn(p.core_shape, dtype=torch.float64, requires_grad=True)
        y = p.x if p.matrix is None else p.x @ p.matrix
        y = y @ core.T if p.V is None else y @ core.T @ p.V.T
        expected += torch.autograd.grad(y, core, factor * p.dy)[0]
        output = p.ours(leaf=leaf, skip_zeros=skip_zeros)
        assert torch.equal(output, p.ours(skip_zeros=skip_zeros))
        p.values.grad = None
        output.backward(factor * p.dy)
        without = torch.autograd.grad(p.ours(skip_zeros=skip_zeros), p.values, factor * p.dy)[0]
        assert torch.equal(p.values.grad, without)
        torch.testing.assert_close(leaf.grad, expected, **EXACT)
    assert (leaf.grad.flatten() != 0).all(), "also beyond the support"


def test_leaf_of_frozen_values_or_of_a_gradient_of_something_else_receives_nothing():
    p, leaf = Problem(), new_leaf(CORE)
    torch.autograd.grad(p.ours(leaf=leaf), p.x, p.dy)
    p.values.requires_grad_(False)
    p.ours(leaf=leaf).backward(p.dy)
    assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_leaf_keeps_its_own_dtype(dtype):
    exact, p = Problem(), Problem()
    expected, leaf = new_leaf(CORE), new_leaf(CORE, torch.float32)
    exact.ours(leaf=expected).backward(exact.dy)
    p.result, p.x = (t.detach().to(dtype).requires_grad_() for t in (p.result, p.x))
    p.U, p.V = p.U.to(dtype), p.V.to(dtype)
    p.ours(leaf=leaf).backward(p.dy.to(dtype))
    assert leaf.grad.dtype == torch.float32
    assert (leaf.grad - expected.grad).norm() <= 0.02 * expected.grad.norm()


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_float16_overflow_is_left_out_of_the_leafs_gradient(bad):
    """Outside of the support it does not reach the gradient scaler."""
    p, leaf = Problem(), new_leaf(CORE, torch.float32)
    p.result, p.x, p.dy = p.result.detach().half().requires_grad_(), p.x.detach().half(), p.dy.half()
    p.U, p.V = p.U.half(), p.V.half()
    p.dy[0, 0] = bad
    p.ours(leaf=leaf).backward(p.dy)
    assert torch.isfinite(leaf.grad).all()
    assert not torch.isfinite(p.values.grad).all(), "the scaler must see it"


@pytest.mark.parametrize("blocks", [True, False])
def test_observer_gets_exactly_x_and_dy_and_the_result_is_unchanged(blocks):
    problem, seen = Problem(shape=(2, 3)), []

    def observer(x, dy):
        seen.append((x.clone(), dy.clone()))
        return True

    output = observe_gradient(problem.result, problem.x, problem.values, observer, blocks)
    assert torch.equal(output, problem.result)
    assert not seen
    output.backward(problem.dy)
    ((x, dy),) = seen
    assert torch.equal(x, problem.x.detach().reshape(6, IN))
    assert torch.equal(dy, problem.dy.reshape(6, OUT))
    assert torch.equal(problem.result.grad, problem.dy)
    assert problem.x.grad is None
    if blocks:
        assert torch.equal(problem.values.grad, torch.zeros_like(problem.values))
    else:
        assert problem.values.grad is None


def test_observed_layer_still_sends_its_gradient_down():
    """The gradient of x comes through the layer itself, and is what it is without an observer."""
    p = Problem()
    (expected,) = torch.autograd.grad(p.ours(), p.x, p.dy)
    observed = observe_gradient(p.ours(), p.x, p.values, lambda x, dy: True, blocks=False)
    assert torch.equal(torch.autograd.grad(observed, p.x, p.dy)[0], expected)


def test_observer_runs_where_only_the_values_require_a_gradient():
    p, seen = Problem(), []

    def observer(x, dy):
        seen.append(dy)
        return True

    observe_gradient(p.result.detach(), p.x.detach(), p.values, observer, blocks=True).backward(p.dy)
    assert len(seen) == 1


def test_observer_that_met_an_overflow_tells_the_gradient_scaler():
    p = Problem()
    observe_gradient(p.result, p.x, p.values, lambda x, dy: False, blocks=True).backward(p.dy)
    assert torch.isinf(p.values.grad).all()
    assert torch.equal(p.result.grad, p.dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_basis_of_another_dtype_is_used_in_that_of_the_result_and_kept_as_it_is(dtype):
    p, kept = Problem(), []
    expected = p.result.to(dtype) + (p.x @ p.weight().T).to(dtype)
    p.U, p.V = p.U.float(), p.V.float()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = delta_product(p.result.to(dtype), p.x, p.core())
    assert output.dtype == dtype
    assert {p.U.data_ptr(), p.V.data_ptr()} <= {tensor.data_ptr() for tensor in kept}, "no copy of its own"
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.05)
