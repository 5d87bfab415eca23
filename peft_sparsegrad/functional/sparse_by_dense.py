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
    rows, C = _rows_of_product(a, b)
    product = a.new_zeros(a.shape[0], b.shape[1])
    product[rows] = C
    return product


def sparse_by_dense_coo(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `a @ b` as a sparse COO tensor, by equation (2) of the paper: a gradient for `torch.optim.SparseAdam`.

    C_coo(rows(k), l) = C(k, l), with C and `rows` of equation (1). The paper has cols(l) in place of l. But `cols` are
    columns of `a`, over which the product sums, and C has all the columns of `b`.

    Args:
        a: Matrix of shape (b, c), with rows and columns of zeros.
        b: Matrix of shape (c, d).

    Returns:
        Coalesced tensor of shape (b, d) with an entry for each of the d columns of each row of `a` that is not zero.
    """
    rows, C = _rows_of_product(a, b)
    columns = torch.arange(b.shape[1], device=b.device)
    indices = torch.stack([rows.repeat_interleave(len(columns)), columns.repeat(len(rows))])
    return torch.sparse_coo_tensor(
        indices, C.flatten(), (a.shape[0], b.shape[1]), is_coalesced=True, check_invariants=False
    )


def _rows_of_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of `a` that hold a non-zero entry, and C of equation (1): those rows of `a @ b`."""
    nonzero = a != 0
    rows, cols = nonzero.any(1).nonzero().flatten(), nonzero.any(0).nonzero().flatten()
    return rows, a[rows][:, cols] @ b[cols]
