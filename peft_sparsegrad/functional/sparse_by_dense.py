"""The sparse-by-dense product of the SparseGrad paper, section 3.3."""

from __future__ import annotations

import torch


def sparse_by_dense(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `a @ b` where whole rows and columns of `a` are zero, by equation (1) of the paper.

    C = A(rows, :)(:, cols) B(cols, :), with `rows` and `cols` those that hold a non-zero entry. In a backward pass
    `a` is the transposed gradient of the output, in which tokens that do not affect the loss are zero columns.

    Args:
        a: Matrix of shape (b, c), with rows and columns of zeros.
        b: Matrix of shape (c, d).

    Returns:
        Matrix of shape (b, d), equal to `a @ b`.
    """
    nonzero = a != 0
    rows, cols = nonzero.any(1).nonzero().flatten(), nonzero.any(0).nonzero().flatten()
    product = a.new_zeros(a.shape[0], b.shape[1])
    product[rows] = a[rows][:, cols] @ b[cols]
    return product
