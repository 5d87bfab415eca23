import pytest
import torch

from peft_sparsegrad import SparseGradAdam
from peft_sparsegrad.functional import sparse_by_dense, sparse_by_dense_coo


def sparse_matrix(rows: list[int], cols: list[int]) -> torch.Tensor:
    """(6, 8) in float64, random at the crossings of `rows` and `cols`."""
    a = torch.zeros(6, 8, dtype=torch.float64)
    for row in rows:
        for col in cols:
            a[row, col] = 1.0 + row - 0.5 * col
    return a


@pytest.mark.parametrize(
    ("rows", "cols"), [([], []), ([2], [5]), ([0, 5], [1, 6, 7]), (list(range(6)), [3]), (list(range(6)), range(8))]
)
def test_equals_the_dense_product(rows, cols):
    a = sparse_matrix(rows, cols)
    b = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sparse_by_dense(a, b), a @ b, rtol=1e-14, atol=1e-14)
    coo = sparse_by_dense_coo(a, b)
    torch.testing.assert_close(coo.to_dense(), a @ b, rtol=1e-14, atol=1e-14)
    assert coo.indices().T.tolist() == [[row, column] for row in rows for column in range(5)]


def test_scattered_zeros_and_a_transposed_view():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    a[torch.rand(8, 6, generator=generator) < 0.8] = 0
    b = torch.randn(8, 5, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(sparse_by_dense(a.T, b), a.T @ b, rtol=1e-14, atol=1e-14)


def test_nan_in_a_row_that_is_used_is_not_hidden():
    a, b = sparse_matrix([1], [2]), torch.ones(8, 5, dtype=torch.float64)
    b[2, 0] = float("nan")
    assert torch.isnan(sparse_by_dense(a, b)[1, 0])


def test_coo_gradient_takes_the_step_of_the_dense_one_in_masked_adam():
    """In float64; SparseAdam scales its epsilon with the bias correction, so both are given one of nearly 0."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    coo, dense = (torch.nn.Parameter(start.clone()) for _ in range(2))
    sparse_adam = torch.optim.SparseAdam([coo], lr=0.1, eps=1e-30)
    masked_adam = SparseGradAdam([dense], lr=0.1, eps=1e-30)
    for rows in ([0, 3], [3, 5], [1], [0, 1, 3]):
        a, b = sparse_matrix(rows, [2, 7]), torch.randn(8, 5, dtype=torch.float64, generator=generator)
        coo.grad, dense.grad = sparse_by_dense_coo(a, b), a @ b
        sparse_adam.step()
        masked_adam.step()
    torch.testing.assert_close(coo, dense, rtol=1e-12, atol=1e-12)
    assert torch.equal(coo[[2, 4]], start[[2, 4]])
    assert (coo[[0, 1, 3, 5]] != start[[0, 1, 3, 5]]).all()
