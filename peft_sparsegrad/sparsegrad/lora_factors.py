"""The factors of a SparseGrad layer as LoRA: exact ones, and the best of a smaller rank."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..common.lora_factors import LoraFactors, relative_error
from ..functional import from_core, side_like
from .adapter import LayerAdapter


@torch.no_grad()
def lora_factors(adapter: LayerAdapter, rank: int | None) -> LoraFactors:
    """Return factors of V S Uᵀ that are exact, or of the given `rank` where that is smaller."""
    a, b = _exact_factors(adapter)
    error = 0.0
    if rank is not None and rank < a.shape[0]:
        delta = b @ a
        a, b = _truncate(a, b, rank)
        error = relative_error(delta, a, b)
    dtype = torch.promote_types(adapter.values.dtype, torch.float32)
    return LoraFactors(a.to(dtype), b.to(dtype), error)


def _exact_factors(adapter: LayerAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) with B A = V S Uᵀ; r is the smaller number of rows or columns of S in use."""
    core = adapter.core.matrix(torch.float64).detach()
    out_features, in_features = adapter.plan.weight_shape
    U, V = (side_like(side, core) for side in (adapter.basis.U, adapter.basis.V))
    rows, columns = (core != 0).any(1), (core != 0).any(0)
    if not core.any():
        rows[0] = columns[0] = True  # LoRA has no rank 0
    if rows.sum() <= columns.sum():
        return from_core(core[rows], U, in_features), from_core(_unit_rows(rows, core), V, out_features).T
    return from_core(_unit_rows(columns, core), U, in_features), from_core(core[:, columns].T, V, out_features).T


def _unit_rows(chosen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the chosen rows of an identity matrix, which as a whole would be as wide as the weight."""
    return functional.one_hot(chosen.nonzero().flatten(), len(chosen)).to(like)


def _truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best factors of `rank` for b @ a, from the SVD of a small matrix between two orthogonal ones."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    left, singular_values, right = torch.linalg.svd(r_b @ r_a.T)
    root = singular_values[:rank].sqrt()
    return (q_a @ right[:rank].T * root).T, q_b @ left[:, :rank] * root
