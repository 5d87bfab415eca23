"""The two factors of a LoRA adapter on one layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad


class LoraFactors(NamedTuple):
    """Factors of ΔW ≈ B A.

    Attributes:
        a: A, shape (r, in).
        b: B, shape (out, r).
        error: ‖ΔW − BA‖ / ‖ΔW‖ in the Frobenius norm; 0 if ΔW is zero.
    """

    a: torch.Tensor
    b: torch.Tensor
    error: float

    def padded(self, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (r, in) and B (out, r), on the CPU, with zeros beyond their own rank."""
        missing = r - self.a.shape[0]
        a, b = pad(self.a, (0, 0, 0, missing)), pad(self.b, (0, missing))
        return a.cpu().contiguous(), b.cpu().contiguous()


def relative_error(delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """Return ‖ΔW − BA‖ / ‖ΔW‖ for ΔW (out, in), A (r, in) and B (out, r), or 0 if ΔW is zero."""
    norm = delta.norm().item()
    return (delta - b @ a).norm().item() / norm if norm else 0.0
