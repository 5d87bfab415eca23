"""What `inspect` says of a SparseGrad adapter: its groups, its layers, and which entries carry the delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .saved.sparsegrad import SavedLayer

# Singular values are left out where the core is wider than this on both sides: one layer would take minutes.
WIDEST_CORE = 2048

_BITS_IN_A_BIN = 16


@dataclass
class GroupFacts:
    """Layers with common transition matrices.

    Attributes:
        modules: Their names, `*` for the block's number.
        layers: How many there are.
        weight_shape: (out, in); None if the files do not tell it.
        rank_out: Columns of V; None for the weight's own basis.
        rank_in: Columns of U; None for the weight's own basis.
        orthonormality_error: Largest entry of |UᵀU − I| and |VᵀV − I|; None without transition matrices.
        singular_values: Of ΔW, descending, the mean over the layers; empty if they were not computed. They are those
            of the core, since U and V are orthonormal. The warm-up's spectrum is in its report and in no adapter.
    """

    modules: str
    layers: int
    weight_shape: tuple[int, int] | None
    rank_out: int | None
    rank_in: int | None
    orthonormality_error: float | None
    singular_values: list[float]


@dataclass
class LayerFacts:
    """One layer.

    Attributes:
        module: Its name.
        values: Values in the file.
        share_of_core: Those as a share of the core's entries; None if the files do not tell its size.
        rows_used: Rows of the core with a value in the support; None likewise.
        columns_used: Columns of the core with a value in the support; None likewise.
        norm: ‖ΔW‖, the Frobenius norm, which is that of the values.
        largest: Largest magnitude of a value.
        hold_90_percent: Fewest values with 90% of ‖ΔW‖².
        non_finite: Values that are NaN or infinite.
        settled: Whether the warm-up was over.
        steps: Optimizer steps that the values have taken.
    """

    module: str
    values: int
    share_of_core: float | None
    rows_used: int | None
    columns_used: int | None
    norm: float
    largest: float
    hold_90_percent: int
    non_finite: int
    settled: bool
    steps: int


def layer_facts(layer: SavedLayer) -> LayerFacts:
    """Look at one layer."""
    values, positions, core = layer.values(), layer.indices(), layer.core_shape
    used = None if core is None or positions is None else (positions // core[1], positions % core[1])
    return LayerFacts(
        module=layer.module,
        values=layer.k,
        share_of_core=None if core is None else layer.k / (core[0] * core[1]),
        rows_used=None if used is None else len(used[0].unique()),
        columns_used=None if used is None else len(used[1].unique()),
        norm=values.double().norm().item(),
        largest=values.abs().max().item(),
        hold_90_percent=fewest_with_share(values, 0.9),
        non_finite=int((~torch.isfinite(values)).sum()),
        settled=bool(layer.number("support.settled")),
        steps=layer.number("support.counted"),
    )


def group_facts(layers: list[SavedLayer]) -> list[GroupFacts]:
    """Look at the groups, in the order of their first layers."""
    groups: dict[Any, list[SavedLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return [_group_facts(members) for members in groups.values()]


def fewest_with_share(values: torch.Tensor, share: float) -> int:
    """How many of the values, the largest ones, have this share of their sum of squares; 0 where all are zero.

    Only the magnitudes next to the last of them are sorted, since a GradDrop delta may have 10^8.
    """
    magnitudes = values.flatten().float().abs()
    squares = magnitudes.double().square()
    wanted = share * squares.sum()
    if not wanted > 0:
        return 0
    bins = magnitudes.view(torch.int32) >> _BITS_IN_A_BIN  # the bits of a float are in the order of its magnitude
    energy = torch.bincount(bins, weights=squares).flip(0).cumsum(0)
    last = int((energy < wanted).sum().clamp(max=len(energy) - 1))
    above = bins > len(energy) - 1 - last
    inside = squares[bins == len(energy) - 1 - last].sort(descending=True).values
    reached = (squares[above].sum() + inside.cumsum(0)) >= wanted
    return int(above.sum()) + min(int((~reached).sum()) + 1, len(inside))


def _group_facts(layers: list[SavedLayer]) -> GroupFacts:
    first = layers[0]
    errors = [_orthonormality_error(m) for m in (first.matrix("U"), first.matrix("V")) if m is not None]
    spectra = [spectrum for layer in layers if (spectrum := _singular_values(layer)) is not None]
    return GroupFacts(
        modules=first.role,
        layers=len(layers),
        weight_shape=first.weight_shape,
        rank_out=first.ranks[0],
        rank_in=first.ranks[1],
        orthonormality_error=max(errors) if errors else None,
        singular_values=torch.stack(spectra).mean(0).tolist() if spectra else [],
    )


def _orthonormality_error(matrix: torch.Tensor) -> float:
    gram = matrix.double().T @ matrix.double()
    return (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item()


def _singular_values(layer: SavedLayer) -> torch.Tensor | None:
    """Of the core, descending, float64; None where there are too many, or the values are not finite."""
    if layer.core_shape is None or min(layer.core_shape) > WIDEST_CORE:
        return None
    values, positions = layer.values().double(), layer.indices()
    if not torch.isfinite(values).all():
        return None
    core = torch.zeros(layer.core_shape[0] * layer.core_shape[1], dtype=torch.float64)
    core[slice(None) if positions is None else positions] = values
    return torch.linalg.svdvals(core.view(layer.core_shape))
