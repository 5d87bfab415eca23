"""The best factors of a given rank for a dense delta, as LoRA."""

from __future__ import annotations

import torch

from ..common.lora_factors import LoraFactors, relative_error


@torch.no_grad()
def lora_factors(delta: torch.Tensor, rank: int) -> LoraFactors:
    """Return factors of ΔW (out, in) by truncated SVD.

    The leading singular vectors of the narrower side are eigenvectors of its Gram matrix, which is found much faster
    than all singular vectors are. Squaring costs nothing here: only the smallest singular values lose digits by it.
    """
    wide = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().T
    leading = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
    rest = leading.T @ wide
    a, b = (rest, leading) if wide.shape == delta.shape else (leading.T, rest.T)
    return LoraFactors(a.to(delta.dtype), b.to(delta.dtype), relative_error(delta.double(), a, b))
