import pytest
import torch

from peft_sparsegrad.functional import sparse_by_dense


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
