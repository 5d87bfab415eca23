"""Streaming HOSVD: the transition matrices of a stack of gradients that is never stacked.

The left singular vectors of the stack's unfoldings (SparseGrad, section 3.1) are the eigenvectors of the Gram
matrices Σ GᵀG (in, in) and Σ GGᵀ (out, out), which are summed as the gradients G = dyᵀ x (out, in) go by: memory does
not grow with the number of steps or blocks. For large layers the Gram matrices are replaced by sketches
(Tropp et al. 2017, arXiv 1706.05736), and then G itself is never formed either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .weight_gradient import at_least_float32, weight_gradient

Reduce = Callable[[torch.Tensor], torch.Tensor]
Ranks = tuple[int | None, int | None]  # columns of (V, U); None leaves a side in its own basis

# Above this dimension a Gram matrix and its eigenvectors cost more than a sketch of it.
EXACT_LIMIT = 4096
# Sweeps over the batches are repeated until one adds less than this share of captured energy.
SKETCH_TOLERANCE = 0.005
SKETCH_MAX_PASSES = 6


@dataclasses.dataclass
class Hosvd:
    """The transition matrices of a group of layers, with the spectra they come from.

    Attributes:
        U: Input transition matrix, shape (in, r_in), orthonormal columns, largest energy first; or None.
        V: Output transition matrix, shape (out, r_out), orthonormal columns, largest energy first; or None.
        spectrum_in: Gradient energy along each column of U, descending, followed by the energy beyond r_in where it is
            known; empty if U is None.
        spectrum_out: Gradient energy along each column of V, descending, followed by the energy beyond r_out where it
            is known; empty if V is None.
        energy: Σ ‖G‖² over everything observed; an estimate with the method `"sketch"`.
        method: `"exact"` or `"sketch"`.
    """

    U: torch.Tensor | None
    V: torch.Tensor | None
    spectrum_in: torch.Tensor
    spectrum_out: torch.Tensor
    energy: float
    method: str


def hosvd_accumulator(
    out_features: int, in_features: int, ranks: Ranks, device: torch.device | str = "cpu"
) -> ExactHosvd | SketchedHosvd:
    """Return the accumulator for a layer: exact up to `EXACT_LIMIT` or if most columns are wanted, else a sketch."""
    wanted = [(r, n) for r, n in zip(ranks, (out_features, in_features), strict=True) if r is not None]
    wide = all(2 * sketch_size(r) >= n for r, n in wanted)
    kind = ExactHosvd if wide or max(n for _, n in wanted) <= EXACT_LIMIT else SketchedHosvd
    return kind(out_features, in_features, ranks, device)


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
            rows = _rows_of_input(gradient)
            self.gram_in += rows.T @ rows
        if self.gram_out is not None:
            rows = _rows_of_output(gradient)
            self.gram_out += rows.T @ rows

    def finish_pass(self, mean_over_ranks: Reduce = lambda t: t) -> bool:
        """Return True: one sweep over the batches is enough for exact sums."""
        return True

    def result(self) -> Hosvd:
        """Return the eigenvectors of the summed Gram matrices, computed on the CPU."""
        spectrum_out, V = leading_eigenvectors(self.gram_out, self.ranks[0])
        spectrum_in, U = leading_eigenvectors(self.gram_in, self.ranks[1])
        return Hosvd(U, V, spectrum_in, spectrum_out, self.energy.item(), "exact")


class SketchedHosvd:
    """Sketch of the Gram matrices that `ExactHosvd` sums. Memory: about 2 (r_in in + r_out out) entries.

    A single pass misses the subspace of a flat spectrum. So `finish_pass` reports whether the last sweep still added
    captured energy; if it did, the next one starts from the subspace found so far (subspace iteration).

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
            self.sketch_in.add_rows(_rows_of_input(gradient))
        if self.sketch_out is not None:
            self.sketch_out.add_rows(_rows_of_output(gradient))

    def finish_pass(self, mean_over_ranks: Reduce = lambda t: t) -> bool:
        """End a sweep over the batches, and return whether another one would add next to nothing."""
        return all([sketch.finish_pass(mean_over_ranks) for sketch in self.sketches])

    def result(self) -> Hosvd:
        """Return the leading eigenvectors found by the last finished pass, on the CPU."""
        nothing = torch.zeros(0, dtype=torch.float64), None
        spectrum_in, U = self.sketch_in.leading() if self.sketch_in is not None else nothing
        spectrum_out, V = self.sketch_out.leading() if self.sketch_out is not None else nothing
        return Hosvd(U, V, spectrum_in, spectrum_out, self.sketches[0].energy, "sketch")


class _GramSketch:
    """Sketch Y = A Ω of the Gram matrix A = Σ GᵀG (n, n) for its `rank` leading eigenvectors."""

    def __init__(self, n: int, rank: int, device: torch.device | str) -> None:
        self.rank, self.passes, self.energy, self.captured = rank, 0, 0.0, 0.0
        width = min(n, sketch_size(rank))
        gaussian = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        self.omega = torch.linalg.qr(gaussian).Q.to(device)
        self.product = torch.zeros_like(self.omega)
        self.probed = torch.zeros((), dtype=torch.float64, device=device)

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

    def finish_pass(self, mean_over_ranks: Reduce) -> bool:
        self.passes += 1
        product = mean_over_ranks(self.product).cpu().double()
        omega = self.omega.cpu().double()
        if self.passes == 1:  # a random orthonormal Ω sees its share of the energy, a converged one does not
            self.energy = self.probed.item() * omega.shape[0] / omega.shape[1]
        self.spectrum, self.vectors = _nystrom(product, omega)
        before, self.captured = self.captured, self.spectrum[: self.rank].sum().item()
        self.omega = torch.linalg.qr(product).Q.to(self.omega)
        self.product, self.probed = torch.zeros_like(self.omega), torch.zeros_like(self.probed)
        settled = self.captured - before <= SKETCH_TOLERANCE * self.captured
        return settled or self.passes >= SKETCH_MAX_PASSES

    def leading(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.spectrum, canonical_signs(self.vectors[:, : self.rank]).float()


def sketch_size(rank: int) -> int:
    """Return the number of columns of a sketch for `rank` eigenvectors: twice as many, for spectra without a gap."""
    return rank + max(16, rank)


def leading_eigenvectors(gram: torch.Tensor | None, rank: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the eigenvalues (n,), descending, and `rank` leading eigenvectors (n, rank) of a Gram matrix (n, n).

    Both are on the CPU. If `gram` is None, the eigenvalues are an empty tensor and the eigenvectors are None.
    """
    if gram is None:
        return torch.zeros(0, dtype=torch.float64), None
    eigenvalues, vectors = torch.linalg.eigh(gram.cpu().double())
    return eigenvalues.flip(0).clamp(min=0), canonical_signs(vectors.flip(1)[:, :rank]).float()


def canonical_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Return columns (n, r) with each one's largest entry made positive, so that the solver does not decide signs."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _nystrom(product: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues and eigenvectors of the Nyström approximation of A, with `product` = A Ω.

    See Tropp et al. 2017, arXiv 1706.05736.
    """
    # the products were summed in float32: values below its rounding are noise and must not be divided by
    shift = torch.finfo(torch.float32).eps * product.norm().clamp(min=torch.finfo(product.dtype).tiny)
    shifted = product + shift * omega
    small = omega.T @ shifted
    eigenvalues, rotation = torch.linalg.eigh((small + small.T) / 2)
    root = rotation * eigenvalues.clamp(min=shift.item()).rsqrt()
    vectors, singular_values, _ = torch.linalg.svd(shifted @ root, full_matrices=False)
    return (singular_values.square() - shift).clamp(min=0), vectors


def _rows_of_input(gradient: torch.Tensor) -> torch.Tensor:
    """Return the rows (experts * out, in) of gradients (experts, out, in)."""
    return gradient.reshape(-1, gradient.shape[-1])


def _rows_of_output(gradient: torch.Tensor) -> torch.Tensor:
    """Return the columns of gradients (experts, out, in) as rows (experts * in, out)."""
    return gradient.transpose(-2, -1).reshape(-1, gradient.shape[-2])
