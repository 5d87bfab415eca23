from __future__ import annotations

import pickle
import threading

import pytest
import torch

from peft_sparsegrad.functional import ExactHosvd, SketchedHosvd, hosvd_accumulator, hosvd_of_weight
from peft_sparsegrad.functional.eigenvectors import leading_eigenvectors, sketch_size

OUT, IN = 24, 36
ACCUMULATORS = pytest.mark.parametrize("accumulator_class", [ExactHosvd, SketchedHosvd])


def stream(
    out: int, in_: int, decay: float, steps: int = 6, tokens: int = 24, dtype=torch.float64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (x, dy) whose gradients' singular values fall by `decay` from one direction to the next."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    q_in, q_out = torch.linalg.qr(randn(in_, in_)).Q, torch.linalg.qr(randn(out, out)).Q
    s_in, s_out = (decay ** torch.arange(n, dtype=torch.float64) for n in (in_, out))
    batches = [((randn(tokens, in_) * s_in) @ q_in.T, (randn(tokens, out) * s_out) @ q_out.T) for _ in range(steps)]
    return [(x.to(dtype), dy.to(dtype)) for x, dy in batches]


def run(accumulator, batches, sweeps=None, mean_over_ranks=lambda tensor: tensor):
    """One sweep, or as many as a sketch needs to converge."""
    for _ in range(sweeps or (6 if isinstance(accumulator, SketchedHosvd) else 1)):
        for x, dy in batches:
            accumulator.update(x, dy, mean_over_ranks)
        accumulator.finish_sweep(mean_over_ranks)
    return accumulator.result()


def svd_of_unfoldings(batches):
    """Singular vectors and values of the stack along its input and output dimension, as the paper computes them."""
    gradients = [(dy.double().T @ x.double()) for x, dy in batches]
    _, s_in, vh = torch.linalg.svd(torch.cat(gradients, 0), full_matrices=False)
    u, s_out, _ = torch.linalg.svd(torch.cat(gradients, 1), full_matrices=False)
    return vh.T, s_in, u, s_out


def largest_principal_angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between the column spaces, by its sine, which is accurate for small angles."""
    a, b = torch.linalg.qr(a.double()).Q, torch.linalg.qr(b.double()).Q
    return torch.linalg.matrix_norm(b - a @ (a.T @ b), 2).clamp(max=1).asin().item()


def captured(batches, U, V) -> tuple[float, float]:
    """Energy of the gradients within the columns of U, and within those of V."""
    gradients = [dy.double().T @ x.double() for x, dy in batches]
    within_u = sum((g @ U.double()).square().sum().item() for g in gradients)
    return within_u, sum((V.double().T @ g).square().sum().item() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_is_the_svd_of_the_stack(dtype):
    batches = stream(OUT, IN, 0.8, dtype=dtype)
    found = run(ExactHosvd(OUT, IN, (6, 8)), batches)
    right, s_in, left, s_out = svd_of_unfoldings(batches)
    assert found.method == "exact"
    assert largest_principal_angle(found.U, right[:, :8]) < 1e-3
    assert largest_principal_angle(found.V, left[:, :6]) < 1e-3
    for r in range(1, 7):  # the spectrum separates, so every leading subspace agrees and not just the last
        assert largest_principal_angle(found.V[:, :r], left[:, :r]) < 1e-3
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(found.spectrum_in, s_in.square(), **tolerance)
    torch.testing.assert_close(found.spectrum_out, s_out.square(), **tolerance)
    assert found.energy == pytest.approx(s_in.square().sum().item(), rel=1e-6)


@ACCUMULATORS
@pytest.mark.parametrize("decay", [0.8, 1.0])
def test_columns_are_orthonormal_float32_and_have_canonical_signs(accumulator_class, decay):
    found = run(accumulator_class(OUT, IN, (6, 8)), stream(OUT, IN, decay))
    for matrix, shape in ((found.U, (IN, 8)), (found.V, (OUT, 6))):
        assert matrix.shape == shape
        assert matrix.dtype == torch.float32
        assert matrix.device.type == "cpu"
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(shape[1]), atol=1e-5, rtol=0)
        largest = matrix.abs().argmax(0)
        assert (matrix[largest, torch.arange(shape[1])] > 0).all()


def test_full_rank_is_square_and_orthogonal():
    found = run(hosvd_accumulator(OUT, IN, (OUT, IN)), stream(OUT, IN, 0.9))
    torch.testing.assert_close(found.U @ found.U.T, torch.eye(IN), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.V @ found.V.T, torch.eye(OUT), atol=1e-5, rtol=0)


# Sketch widths well below the dimensions, so that there is something to lose.
SKETCHES = [(96, 160, (16, 16)), (160, 200, (40, 40)), (128, 256, (24, 32))]


@pytest.mark.parametrize("sizes", SKETCHES)
@pytest.mark.parametrize("decay", [0.3, 0.7, 0.9, 0.97])
def test_sketch_captures_a_decaying_spectrum(sizes, decay):
    out, in_, core = sizes
    batches = stream(out, in_, decay, dtype=torch.float32)
    exact = run(ExactHosvd(out, in_, core), batches)
    sketched = run(SketchedHosvd(out, in_, core), batches)
    for ours, best in zip(captured(batches, sketched.U, sketched.V), captured(batches, exact.U, exact.V), strict=True):
        assert ours >= 0.98 * best


@pytest.mark.parametrize("sizes", SKETCHES)
@pytest.mark.parametrize(("steps", "tokens"), [(12, 24), (24, 64)])  # more tokens in all than the sketch is wide
def test_sweeps_bring_a_sketch_of_a_flat_spectrum_nearer(sizes, steps, tokens):
    out, in_, core = sizes
    batches = stream(out, in_, 1.0, steps, tokens, dtype=torch.float32)
    best = run(ExactHosvd(out, in_, core), batches)
    once, twice, often = (run(SketchedHosvd(out, in_, core), batches, sweeps) for sweeps in (1, 2, 6))
    for energies in zip(*(captured(batches, found.U, found.V) for found in (once, twice, often, best)), strict=True):
        first, second, last, optimum = energies
        assert first < 0.99 * optimum, "one sweep would have done"
        assert first < second < last
        assert last >= 0.98 * optimum


def test_sketch_finds_the_subspace_where_the_spectrum_separates():
    batches = stream(160, 200, 0.7)
    sketched = run(SketchedHosvd(160, 200, (6, 8)), batches)
    right, _, left, _ = svd_of_unfoldings(batches)
    assert largest_principal_angle(sketched.U, right[:, :8]) < 1e-3
    assert largest_principal_angle(sketched.V, left[:, :6]) < 1e-3


@pytest.mark.parametrize(("decay", "steps", "tokens"), [(0.97, 6, 24), (0.7, 6, 24), (0.3, 6, 24), (1.0, 1, 3)])
def test_spectrum_of_the_sketch(decay, steps, tokens):
    """Also of steep spectra, and of fewer tokens than columns: a float32 sketch has float32's noise."""
    batches = stream(160, 200, decay, steps, tokens, dtype=torch.float32)
    exact = run(ExactHosvd(160, 200, (40, 40)), batches)
    sketched = run(SketchedHosvd(160, 200, (40, 40)), batches)
    for ours, reference in (
        (sketched.spectrum_in, exact.spectrum_in),
        (sketched.spectrum_out, exact.spectrum_out),
    ):
        assert (ours.diff() <= 0).all()
        torch.testing.assert_close(ours[:40], reference[:40], rtol=0.02, atol=1e-4 * reference[0].item())
    assert sketched.method == "sketch"


@pytest.mark.parametrize(("steps", "tokens"), [(6, 24), (40, 64)])
def test_energy_of_a_flat_sketch_is_an_estimate_of_the_sum(steps, tokens):
    batches = stream(160, 200, 1.0, steps, tokens, dtype=torch.float32)
    total = sum((dy.T @ x).square().sum().item() for x, dy in batches)
    assert run(SketchedHosvd(160, 200, (40, 40)), batches).energy == pytest.approx(total, rel=0.1)


@ACCUMULATORS
def test_memory_does_not_grow_with_the_steps(accumulator_class):
    batches = stream(OUT, IN, 0.9, steps=30)
    accumulator = accumulator_class(OUT, IN, (4, 4))
    sizes = set()
    for x, dy in batches:
        accumulator.update(x, dy)
        sizes.add(len(pickle.dumps(accumulator)))
    assert len(sizes) == 1


def test_sketch_is_smaller_than_the_gram_matrices():
    exact, sketch = ExactHosvd(500, 600, (10, 10)), SketchedHosvd(500, 600, (10, 10))
    assert len(pickle.dumps(sketch)) < len(pickle.dumps(exact)) / 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_update_is_add_gradient(dtype):
    by_batch, by_gradient = ExactHosvd(OUT, IN, (6, 8)), ExactHosvd(OUT, IN, (6, 8))
    for x, dy in stream(OUT, IN, 0.8, dtype=dtype):
        by_batch.update(x, dy)
        by_gradient.add_gradient((dy.T @ x).to(torch.promote_types(dtype, torch.float32)))
    assert torch.equal(by_batch.gram_in, by_gradient.gram_in)
    assert torch.equal(by_batch.gram_out, by_gradient.gram_out)
    assert by_batch.gram_in.abs().sum() > 0


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_the_basis_of_gradients_in_bfloat16_is_theirs_in_float64(x_dtype):
    """In a layer that computes in bfloat16, also one whose input autocast has not rounded yet."""
    batches = [(x.to(x_dtype), dy.bfloat16()) for x, dy in stream(OUT, IN, 0.5, dtype=torch.float32)]
    found, exact = ExactHosvd(OUT, IN, (6, 8)), ExactHosvd(OUT, IN, (6, 8))
    for x, dy in batches:
        found.update(x, dy)
        exact.update(x.double(), dy.double())
    found, exact = found.result(), exact.result()
    best, own = captured(batches, exact.U, exact.V), captured(batches, found.U, found.V)
    assert all(one > (1 - 1e-4) * other for one, other in zip(own, best, strict=True))
    noise = 1e-6 * exact.spectrum_in[0].item()  # of the largest direction's rounding, in every other one
    torch.testing.assert_close(found.spectrum_in[:6], exact.spectrum_in[:6], rtol=0.01, atol=noise)


class TwoRanks:
    """Two threads that exchange tensors as `all_reduce` does, with the mean as the operation."""

    def __init__(self) -> None:
        self.barrier, self.given = threading.Barrier(2, timeout=20), [None, None]

    def reduce_of(self, rank: int):
        def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
            self.given[rank] = tensor.clone()
            self.barrier.wait()
            mean = (self.given[0] + self.given[1]) / 2
            self.barrier.wait()
            return tensor.copy_(mean)

        return mean_over_ranks

    def run(self, work) -> list:
        results, errors = [None, None], []

        def target(rank: int) -> None:
            try:
                results[rank] = work(rank, self.reduce_of(rank))
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        return results


@ACCUMULATORS
def test_two_ranks_with_half_the_tokens_find_what_one_finds_with_all(accumulator_class):
    batches, core = stream(64, 96, 0.8), (6, 8)

    def work(rank, mean_over_ranks):
        half = slice(rank * 12, (rank + 1) * 12)
        own = [(x[half], dy[half]) for x, dy in batches]
        return run(accumulator_class(64, 96, core), own, mean_over_ranks=mean_over_ranks)

    alone = run(accumulator_class(64, 96, core), batches)
    for found in TwoRanks().run(work):
        torch.testing.assert_close(found.U, alone.U, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.V, alone.V, atol=1e-4, rtol=0)
        torch.testing.assert_close(4 * found.spectrum_in[:8], alone.spectrum_in[:8], rtol=1e-4, atol=1e-4)
        assert 4 * found.energy == pytest.approx(alone.energy, rel=1e-4)


def test_svd_of_a_weight():
    weight = stream(OUT, IN, 0.8, steps=1)[0]
    weight = (weight[1].T @ weight[0]).float()
    found = hosvd_of_weight(torch.nn.Parameter(weight), (6, 8))
    left, values, right = torch.linalg.svd(weight.double())
    assert largest_principal_angle(found.U, right[:8].T) < 1e-3
    assert largest_principal_angle(found.V, left[:, :6]) < 1e-3
    torch.testing.assert_close(found.spectrum_in[:8], values[:8].square(), rtol=1e-4, atol=1e-4)
    assert not found.U.requires_grad


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1024, 900, (150, 150)), ExactHosvd),
        ((512, 5000, (64, 64)), SketchedHosvd),
        ((5000, 512, (64, 64)), SketchedHosvd),
        ((256, 4200, (256, 4200)), ExactHosvd),
    ],
)
def test_large_layers_are_sketched_unless_nearly_every_column_is_wanted(sizes, expected):
    assert isinstance(hosvd_accumulator(*sizes, device="meta"), expected)


# One side only: the other keeps its own basis.


@ACCUMULATORS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_side_is_what_it_is_with_the_other(accumulator_class, dtype):
    batches = stream(64, 96, 0.8, dtype=dtype)
    both = run(accumulator_class(64, 96, (6, 8)), batches)
    only_in = run(accumulator_class(64, 96, (None, 8)), batches)
    only_out = run(accumulator_class(64, 96, (6, None)), batches)
    assert only_in.V is only_out.U is None
    assert only_in.spectrum_out.shape == only_out.spectrum_in.shape == (0,)
    assert only_in.spectrum_out.dtype == only_out.spectrum_in.dtype == torch.float64
    torch.testing.assert_close(only_in.U, both.U, atol=1e-5, rtol=0)
    torch.testing.assert_close(only_out.V, both.V, atol=1e-5, rtol=0)
    torch.testing.assert_close(only_in.spectrum_in, both.spectrum_in, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(only_out.spectrum_out, both.spectrum_out, rtol=1e-5, atol=1e-5)
    total = sum((dy.double().T @ x.double()).square().sum().item() for x, dy in batches)
    if accumulator_class is ExactHosvd:
        assert only_in.energy == only_out.energy == pytest.approx(total, rel=1e-5)
    else:
        assert only_in.energy == both.energy


def test_no_side_has_the_energy_and_nothing_else():
    batches = stream(OUT, IN, 0.8)
    found = run(ExactHosvd(OUT, IN, (None, None)), batches)
    assert found.U is found.V is None
    assert found.energy == pytest.approx(sum((dy.T @ x).square().sum().item() for x, dy in batches))


@ACCUMULATORS
def test_side_in_its_own_basis_costs_no_memory(accumulator_class):
    both = len(pickle.dumps(accumulator_class(300, 900, (8, 8))))
    assert len(pickle.dumps(accumulator_class(300, 900, (8, None)))) < both / 3


@pytest.mark.parametrize("ranks", [(None, 8), (6, None)])
def test_one_sided_svd_of_a_weight(ranks):
    weight = torch.randn(OUT, IN)
    found, both = hosvd_of_weight(weight, ranks), hosvd_of_weight(weight, (6, 8))
    for ours, theirs, rank in ((found.V, both.V, ranks[0]), (found.U, both.U, ranks[1])):
        assert ours is None if rank is None else torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((512, 5000, (64, None)), ExactHosvd),  # the long side keeps its own basis
        ((512, 5000, (None, 64)), SketchedHosvd),
        ((5000, 512, (None, 64)), ExactHosvd),
        ((5000, 512, (64, None)), SketchedHosvd),
        ((64, 5000, (None, 1250)), ExactHosvd),  # its sketch would be half as wide
        ((64, 5000, (None, 1249)), SketchedHosvd),
        ((1024, 1024, (1, None)), ExactHosvd),
        ((1025, 8, (1, None)), SketchedHosvd),
    ],
)
def test_only_sides_with_a_matrix_decide_whether_to_sketch(sizes, expected):
    assert isinstance(hosvd_accumulator(*sizes, device="meta"), expected)


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("n", "rank"), [(1100, 16), (1300, 100)])
def test_subspace_iteration_finds_the_leading_eigenvectors(n, rank, decay):
    """Held to all eigenvectors: the same energy, and below a gap in the spectrum the same directions."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(n, n, dtype=torch.float64, generator=generator) * (1 + torch.arange(n)).double() ** -decay
    rows[:, :4] *= 100
    gram = rows.T @ rows
    values, vectors = torch.linalg.eigh(gram)
    found_values, found = leading_eigenvectors(gram, rank)
    assert found_values.shape == (sketch_size(rank),)
    assert found.shape == (n, rank)
    assert largest_principal_angle(found[:, :4], vectors[:, -4:]) < 1e-5
    best = values[-rank:].sum().item()
    assert 0.999 * best < (found.T.double() @ gram @ found.double()).trace().item() < 1.00001 * best
    torch.testing.assert_close(found_values[:4], values.flip(0)[:4], rtol=1e-8, atol=0)
