"""The sparse-by-dense product of the SparseGrad paper, section 3.3."""

from __future__ import annotations

import torch


def sparse_by_dense(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` where whole rows and columns of `a` are zero, equation (1) of the paper.

    C = A(rows, :)(:, cols) B(cols, :), with `rows` and `cols` those that hold a non-zero entry. In a backward pass
    `a` is the transposed gradient of the output: the tokens that the loss does not see are zero columns.

    Args:
        a: Shape (b, c), with rows and columns of zeros.
        b: Shape (c, d).

    Returns:
        Shape (b, d), equal to `a @ b`; its other rows are zero.
    """
    nonzero = a != 0
    rows, cols = nonzero.any(1).nonzero().flatten(), nonzero.any(0).nonzero().flatten()
    product = a.new_zeros(a.shape[0], b.shape[1])
    product[rows] = a[rows][:, cols] @ b[cols]
    return product
