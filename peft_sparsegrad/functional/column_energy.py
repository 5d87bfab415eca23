"""The columns of a weight, its input features, whose gradient has most energy: a basis without a transition matrix."""

from __future__ import annotations

import torch

from .hosvd import Hosvd, Reduce
from .weight_gradient import weight_gradient


class ColumnEnergy:
    """Sum of the energy Σ_i G_ij² of each column j of the gradients G (out, in). Memory: in entries.

    Args:
        in_features: Columns of the gradient.
        rank: Number of columns to choose.
        device: Where the energies are summed.
    """

    def __init__(self, in_features: int, rank: int, device: torch.device | str = "cpu") -> None:
        self.rank, self.energies = rank, torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor, dy: torch.Tensor, mean_over_ranks: Reduce = lambda t: t) -> None:
        """Add the gradient dyᵀ x of x (tokens, in) and dy (tokens, out), averaged by `mean_over_ranks`."""
        self.add_gradient(mean_over_ranks(weight_gradient(x, dy)))

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """Add one gradient, shape (out, in), or those of several experts, shape (experts, out, in)."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        self.energies += rows.square().sum(0).to(self.energies)

    def finish_sweep(self, mean_over_ranks: Reduce = lambda t: t) -> None:
        """End a sweep over batches: nothing is left to do for exact sums."""

    def result(self) -> Hosvd:
        """Return the numbers of the columns with most energy, ascending, as U, and the energies of all, descending."""
        energies = self.energies.cpu()
        chosen = energies.sort(descending=True, stable=True).indices[: self.rank].sort().values
        spectrum = energies.sort(descending=True).values
        nothing = torch.zeros(0, dtype=torch.float64)
        return Hosvd(chosen, None, spectrum, nothing, energies.sum().item(), "columns")
