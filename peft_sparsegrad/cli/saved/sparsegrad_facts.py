"""Facts that `inspect` tells of a SparseGrad adapter: its groups, its layers, and the entries that carry the delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...functional import is_selection
from ..output import percent, shape
from .concentration import fewest_with_share
from .method import Table
from .sparsegrad_layers import SavedLayer

# Singular values are left out where the core is wider than this on both sides: one layer would take minutes.
WIDEST_CORE = 2048

_SHOWN_SINGULAR_VALUES = 4


@dataclass
class GroupFacts:
    """Layers with common transition matrices.

    Attributes:
        modules: Their names, `*` for the block's number.
        layers: How many there are.
        weight_shape: (out, in).
        rank_out: Columns of V; None for the weight's own basis.
        rank_in: Columns of U; None for the weight's own basis.
        orthonormality_error: Largest entry of |UᵀU − I| and |VᵀV − I|; None without transition matrices.
        singular_values: Of ΔW, descending, the mean over the layers; empty if they were not computed. They are those
            of the core, since U and V are orthonormal. The warm-up's spectrum is in its report and in no adapter.
    """

    modules: str
    layers: int
    weight_shape: tuple[int, int]
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
        share_of_core: Those as a share of the core's entries.
        rows_used: Rows of the core with a value in the support; None where the whole core trains.
        columns_used: Columns of the core with a value in the support; None where the whole core trains.
        norm: ‖ΔW‖, the Frobenius norm, which is that of the values.
        largest: Largest magnitude of a value.
        hold_90_percent: Fewest values with 90% of ‖ΔW‖².
        non_finite: Values that are NaN or infinite.
        settled: Whether the warm-up was over.
        steps: Optimizer steps that the values have taken.
    """

    module: str
    values: int
    share_of_core: float
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
    values, positions, (rows, columns) = layer.values(), layer.indices(), layer.plan.core_shape
    used = None if positions is None else (positions // columns, positions % columns)
    return LayerFacts(
        module=layer.plan.name,
        values=layer.num_values,
        share_of_core=layer.num_values / (rows * columns),
        rows_used=None if used is None else len(used[0].unique()),
        columns_used=None if used is None else len(used[1].unique()),
        norm=values.double().norm().item(),
        largest=values.abs().max().item(),
        hold_90_percent=fewest_with_share(values, 0.9),
        non_finite=int((~torch.isfinite(values)).sum()),
        settled=layer.steps >= 0,
        steps=max(0, layer.steps),
    )


def group_facts(layers: list[SavedLayer]) -> list[GroupFacts]:
    """Look at the groups, in the order of their first layers."""
    groups: dict[Any, list[SavedLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.plan.group_key, []).append(layer)
    return [_group_facts(members) for members in groups.values()]


def _group_facts(layers: list[SavedLayer]) -> GroupFacts:
    first = layers[0]
    sides = (first.matrix("U"), first.matrix("V"))
    errors = [_orthonormality_error(side) for side in sides if side is not None and not is_selection(side)]
    spectra = [spectrum for layer in layers if (spectrum := _singular_values(layer)) is not None]
    return GroupFacts(
        modules=first.plan.role,
        layers=len(layers),
        weight_shape=first.plan.weight_shape,
        rank_out=first.plan.ranks[0],
        rank_in=first.plan.ranks[1],
        orthonormality_error=max(errors) if errors else None,
        singular_values=torch.stack(spectra).mean(0).tolist() if spectra else [],
    )


def _orthonormality_error(matrix: torch.Tensor) -> float:
    gram = matrix.double().T @ matrix.double()
    return (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item()


def _singular_values(layer: SavedLayer) -> torch.Tensor | None:
    """Of the core, descending, float64; None where there are too many, or the values are not finite."""
    if min(layer.plan.core_shape) > WIDEST_CORE:
        return None
    core = layer.core()
    return torch.linalg.svdvals(core.matrix(torch.float64)) if torch.isfinite(core.values).all() else None


def group_table(groups: list[GroupFacts]) -> Table:
    """Return the groups as a table."""
    columns = (
        "modules",
        "layers",
        "weight",
        "rank of V",
        "rank of U",
        "off orthonormal",
        "singular values of ΔW, mean",
    )
    rows = [
        (
            *(group.modules, group.layers, shape(group.weight_shape), group.rank_out, group.rank_in),
            *(None if group.orthonormality_error is None else f"{group.orthonormality_error:.0e}",),
            *(_leading(group.singular_values),),
        )
        for group in groups
    ]
    return Table("Groups: layers with common transition matrices", columns, rows)


def layer_table(layers: list[LayerFacts]) -> Table:
    """Return the layers as a table."""
    columns = ("module", "values", "of core", "rows", "columns", "‖ΔW‖", "largest", "hold 90% of ‖ΔW‖²", "steps")
    rows = [
        (
            *(layer.module if layer.settled else f"{layer.module} (before its warm-up)", f"{layer.values:,}"),
            *(percent(layer.share_of_core), layer.rows_used, layer.columns_used),
            *(f"{layer.norm:.3g}", f"{layer.largest:.2g}", f"{layer.hold_90_percent:,}", layer.steps),
        )
        for layer in layers
    ]
    return Table("Layers: the core S of ΔW = V S Uᵀ", columns, rows)


def _leading(singular_values: list[float]) -> str | None:
    if not singular_values:
        return None
    shown = " ".join(f"{value:.2g}" for value in singular_values[:_SHOWN_SINGULAR_VALUES])
    left = len(singular_values) - _SHOWN_SINGULAR_VALUES
    return f"{shown} ... ({left} more)" if left > 0 else shown
