"""Streaming HOSVD: the transition matrices of a stack of gradients that is never stacked.

The left singular vectors of the stack's unfoldings (SparseGrad, section 3.1) are the eigenvectors of the Gram
matrices Σ GᵀG (in, in) and Σ GGᵀ (out, out), which are summed as the gradients G = dyᵀ x (out, in) go by: memory does
not grow with the number of steps or blocks. For large layers a sketch takes their place (`hosvd_sketch.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .eigenvectors import leading_eigenvectors
from .weight_gradient import weight_gradient

Reduce = Callable[[torch.Tensor], torch.Tensor]
Ranks = tuple[int | None, int | None]  # columns of (V, U); None leaves a side in its own basis


@dataclasses.dataclass
class Hosvd:
    """The transition matrices of a group of layers, with the spectra they come from.

    Attributes:
        U: Input transition matrix, shape (in, r_in), orthonormal columns, largest energy first; or None.
        V: Output transition matrix, shape (out, r_out), orthonormal columns, largest energy first; or None.
        spectrum_in: Gradient energy along each column of U, descending, followed by that along directions beyond r_in
            which were found with them; empty if U is None.
        spectrum_out: The same along the columns of V; empty if V is None.
        energy: Σ ‖G‖² over everything observed; an estimate with the method `"sketch"`.
        method: `"exact"` or `"sketch"`.
    """

    U: torch.Tensor | None
    V: torch.Tensor | None
    spectrum_in: torch.Tensor
    spectrum_out: torch.Tensor
    energy: float
    method: str


def hosvd_of_weight(weight: torch.Tensor, ranks: Ranks) -> Hosvd:
    """Return the leading singular vectors of a weight (out, in), which are the data-free basis `"svd"`.

    Those of several experts' weights (experts, out, in) are those of their unfoldings.
    """
    accumulator = ExactHosvd(weight.shape[-2], weight.shape[-1], ranks, weight.device)
    accumulator.add_gradient(weight.detach().float())
    return accumulator.result()


class ExactHosvd:
    """Sum of the Gram matrix of each side that gets a transition matrix, in float64. Memory: in² + out² entries.

    Args:
        out_features: Rows of the gradient.
        in_features: Columns of the gradient.
        ranks: (r_out, r_in), the columns wanted of V and U; None for a side that keeps its own basis.
        device: Where the Gram matrices are summed.
    """

    def __init__(self, out_features: int, in_features: int, ranks: Ranks, device: torch.device | str = "cpu") -> None:
        self.ranks, self.energy = ranks, torch.zeros((), dtype=torch.float64, device=device)
        self.gram_out, self.gram_in = (
            None if r is None else torch.zeros(n, n, dtype=torch.float64, device=device)
            for r, n in zip(ranks, (out_features, in_features), strict=True)
        )

    def update(self, x: torch.Tensor, dy: torch.Tensor, mean_over_ranks: Reduce = lambda t: t) -> None:
        """Add the gradient dyᵀ x of x (tokens, in) and dy (tokens, out), averaged by `mean_over_ranks`."""
        self.add_gradient(mean_over_ranks(weight_gradient(x, dy)))

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """Add one gradient, shape (out, in), or those of several experts, shape (experts, out, in)."""
        gradient = gradient.to(self.energy.device)
        self.energy += gradient.square().sum()
        if self.gram_in is not None:
            rows = rows_of_input(gradient)
            self.gram_in += rows.T @ rows
        if self.gram_out is not None:
            rows = rows_of_output(gradient)
            self.gram_out += rows.T @ rows

    def finish_sweep(self, mean_over_ranks: Reduce = lambda t: t) -> None:
        """End a sweep over batches: nothing is left to do for exact sums."""

    def result(self) -> Hosvd:
        """Return the eigenvectors of the summed Gram matrices, computed on the CPU."""
        spectrum_out, V = leading_eigenvectors(self.gram_out, self.ranks[0])
        spectrum_in, U = leading_eigenvectors(self.gram_in, self.ranks[1])
        return Hosvd(U, V, spectrum_in, spectrum_out, self.energy.item(), "exact")


def rows_of_input(gradient: torch.Tensor) -> torch.Tensor:
    """Return the rows (experts * out, in) of gradients (experts, out, in)."""
    return gradient.reshape(-1, gradient.shape[-1])


def rows_of_output(gradient: torch.Tensor) -> torch.Tensor:
    """Return the columns of gradients (experts, out, in) as rows (experts * in, out)."""
    return gradient.transpose(-2, -1).reshape(-1, gradient.shape[-2])
