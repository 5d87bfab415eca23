"""A sketch in place of the Gram matrices of an HOSVD, for layers too wide for them.

See Tropp et al. 2017, arXiv 1706.05736. The gradient itself is never formed either.
"""

from __future__ import annotations

import torch

from .eigenvectors import canonical_signs, random_orthonormal, sketch_size
from .hosvd import Hosvd, Ranks, Reduce, rows_of_input, rows_of_output
from .weight_gradient import at_least_float32


class SketchedHosvd:
    """Sketch of the Gram matrices that `ExactHosvd` sums. Memory: about 2 (r_in in + r_out out) entries.

    A single sweep over the batches misses the subspace of a flat spectrum. So each sweep starts from the subspace that
    the one before it has found (subspace iteration).

    Args:
        out_features: Rows of the gradient.
        in_features: Columns of the gradient.
        ranks: (r_out, r_in), the columns wanted of V and U; None for a side that keeps its own basis.
        device: Where the sketches are summed.
    """

    def __init__(self, out_features: int, in_features: int, ranks: Ranks, device: torch.device | str = "cpu") -> None:
        self.sketch_out, self.sketch_in = (
            None if r is None else _GramSketch(n, r, device)
            for r, n in zip(ranks, (out_features, in_features), strict=True)
        )
        self.sketches = [sketch for sketch in (self.sketch_in, self.sketch_out) if sketch is not None]

    def update(self, x: torch.Tensor, dy: torch.Tensor, mean_over_ranks: Reduce = lambda t: t) -> None:
        """Add one gradient, given as x (tokens, in) and dy (tokens, out); see `ExactHosvd.update`."""
        device = self.sketches[0].omega.device
        x, dy = at_least_float32(x).to(device), at_least_float32(dy).to(device)
        if self.sketch_in is not None:
            self.sketch_in.update(x, dy, mean_over_ranks)
        if self.sketch_out is not None:
            self.sketch_out.update(dy, x, mean_over_ranks)

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """Add gradients that are formed already, shape (out, in) or (experts, out, in)."""
        gradient = at_least_float32(gradient).to(self.sketches[0].omega.device)
        if self.sketch_in is not None:
            self.sketch_in.add_rows(rows_of_input(gradient))
        if self.sketch_out is not None:
            self.sketch_out.add_rows(rows_of_output(gradient))

    def finish_sweep(self, mean_over_ranks: Reduce = lambda t: t) -> None:
        """End a sweep over batches."""
        for sketch in self.sketches:
            sketch.finish_sweep(mean_over_ranks)

    def result(self) -> Hosvd:
        """Return the leading eigenvectors found by the last finished sweep, on the CPU."""
        nothing = torch.zeros(0, dtype=torch.float64), None
        spectrum_in, U = self.sketch_in.leading() if self.sketch_in is not None else nothing
        spectrum_out, V = self.sketch_out.leading() if self.sketch_out is not None else nothing
        return Hosvd(U, V, spectrum_in, spectrum_out, self.sketches[0].energy, "sketch")


class _GramSketch:
    """Sketch Y = A Ω of the Gram matrix A = Σ GᵀG (n, n) for its `rank` leading eigenvectors."""

    def __init__(self, n: int, rank: int, device: torch.device | str) -> None:
        self.rank, self.energy = rank, 0.0
        width = min(n, sketch_size(rank))
        self.omega = random_orthonormal(n, width).to(device)
        self.product = torch.zeros_like(self.omega)
        self.probed = torch.zeros((), dtype=torch.float64, device=device)
        self.spectrum = torch.zeros(0, dtype=torch.float64)
        self.vectors: torch.Tensor | None = None  # (n, width), once a sweep has ended

    def update(self, x: torch.Tensor, dy: torch.Tensor, mean_over_ranks: Reduce) -> None:
        """Add GᵀG Ω with G = dyᵀ x, computed as xᵀ(dy(dyᵀ(x Ω))) so that G is never formed."""
        projected = mean_over_ranks(dy.T @ (x @ self.omega.to(x.dtype)))
        self.product += x.T @ (dy @ projected)
        self.probed += projected.double().square().sum()

    def add_rows(self, rows: torch.Tensor) -> None:
        """Add RᵀR Ω for the rows R (rows, n) of a gradient."""
        projected = rows @ self.omega.to(rows.dtype)
        self.product += rows.T @ projected
        self.probed += projected.double().square().sum()

    def finish_sweep(self, mean_over_ranks: Reduce) -> None:
        product = mean_over_ranks(self.product).cpu().double()
        omega = self.omega.cpu().double()
        if self.vectors is None:  # a random orthonormal Ω sees its share of the energy, a converged one does not
            self.energy = self.probed.item() * omega.shape[0] / omega.shape[1]
        self.spectrum, self.vectors = _nystrom(product, omega)
        self.omega = torch.linalg.qr(product).Q.to(self.omega)
        self.product, self.probed = torch.zeros_like(self.omega), torch.zeros_like(self.probed)

    def leading(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.vectors is not None, "no sweep has ended"
        return self.spectrum, canonical_signs(self.vectors[:, : self.rank]).float()


def _nystrom(product: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues and eigenvectors of the Nyström approximation of A, with `product` = A Ω."""
    # the products were summed in float32: values below its rounding are noise and must not be divided by
    shift = torch.finfo(torch.float32).eps * product.norm().clamp(min=torch.finfo(product.dtype).tiny)
    shifted = product + shift * omega
    small = omega.T @ shifted
    eigenvalues, rotation = torch.linalg.eigh((small + small.T) / 2)
    root = rotation * eigenvalues.clamp(min=shift.item()).rsqrt()
    vectors, singular_values, _ = torch.linalg.svd(shifted @ root, full_matrices=False)
    return (singular_values.square() - shift).clamp(min=0), vectors
