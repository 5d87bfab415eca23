"""The distance of two adapters' deltas, layer by layer, and the overlap of their supports."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .base_models import weight_layouts
from .errors import InputError
from .saved.adapter import SavedAdapter
from .saved.deltas import (
    DenseDeltas,
    FlatDelta,
    WeightLayout,
    delta_shapes,
    graddrop_deltas,
    read_flat_delta,
)
from .saved.sparsegrad import SavedLayer, saved_layers


@dataclass
class LayerDistance:
    """One layer, or with two GradDrop adapters one weight or bias, in the Frobenius norm.

    Attributes:
        module: Its name.
        norm_a: ‖ΔA‖.
        norm_b: ‖ΔB‖.
        product: ⟨ΔA, ΔB⟩.
        distance: ‖ΔA − ΔB‖ / ‖ΔA‖; infinite if only ΔA is zero.
        cosine: ⟨ΔA, ΔB⟩ / (‖ΔA‖ ‖ΔB‖); None if one of them is zero.
        overlap: Entries in both supports as a share of those in either; None if they cannot be compared.
    """

    module: str
    norm_a: float
    norm_b: float
    product: float
    distance: float
    cosine: float | None
    overlap: float | None = None


def layer_distances(a: SavedAdapter, b: SavedAdapter, base: str | None) -> tuple[list[LayerDistance], str | None]:
    """Compare two adapters of SparseGrad, GradDrop or LoRA: their weights, and of two GradDrop adapters biases too.

    Returns:
        The layers, and why supports were not compared, or None if they were.

    Raises:
        InputError: If they are on different layers, or the shape of a weight is not known.
    """
    if a.method == b.method == "GRADDROP":
        return _graddrop_distances(a, b), None
    layouts = _layouts(a, b, base)
    dense_a, dense_b = DenseDeltas(a), DenseDeltas(b)
    distances = [_compare(name, dense_a(name, layout), dense_b(name, layout)) for name, layout in layouts.items()]
    return distances, _add_overlaps(a, b, distances)


def overall(layers: list[LayerDistance]) -> LayerDistance | None:
    """All layers taken as one, None if there are none."""
    if not layers:
        return None
    distance = math.hypot(*(x.distance * x.norm_a if x.norm_a else x.norm_b for x in layers))
    norm_a, norm_b = math.hypot(*(x.norm_a for x in layers)), math.hypot(*(x.norm_b for x in layers))
    return _layer_distance("all", norm_a, norm_b, sum(x.product for x in layers), distance)


def _compare(module: str, a: torch.Tensor, b: torch.Tensor) -> LayerDistance:
    a, b = a.double(), b.double()
    return _layer_distance(module, a.norm().item(), b.norm().item(), (a * b).sum().item(), (a - b).norm().item())


def _layer_distance(module: str, norm_a: float, norm_b: float, product: float, distance: float) -> LayerDistance:
    relative = distance / norm_a if norm_a else (math.inf if distance else 0.0)
    cosine = product / (norm_a * norm_b) if norm_a and norm_b else None
    return LayerDistance(module, norm_a, norm_b, product, relative, cosine)


def _layouts(a: SavedAdapter, b: SavedAdapter, base: str | None) -> dict[str, WeightLayout]:
    """The layout of every weight that both adapters change: of what is in the files, else of the base model."""
    shapes_a, shapes_b = delta_shapes(a), delta_shapes(b)
    _check_same_layers(a, b, set(shapes_a), set(shapes_b))
    known = {module: shapes_a[module] or shapes_b[module] for module in shapes_a}
    if base is None and "GRADDROP" not in (a.method, b.method) and None not in known.values():
        found = {module: WeightLayout(shape) for module, shape in known.items() if shape is not None}
    else:
        every = weight_layouts(a, base)
        if missing := known.keys() - every.keys():
            raise InputError(f"the base model has no linear layer {min(missing)!r}")
        found = {module: every[module] for module in known}
    for module, layout in found.items():
        if {shapes_a[module], shapes_b[module]} - {None, layout.shape}:
            raise InputError(f"{module!r} has a weight of shape {shapes_a[module]} in A and {shapes_b[module]} in B")
    return found


def _check_same_layers(a: SavedAdapter, b: SavedAdapter, in_a: set[str], in_b: set[str]) -> None:
    for adapter, only in ((a, in_a - in_b), (b, in_b - in_a)):
        if only:
            raise InputError(
                f"the adapters are on different layers: only {adapter.folder} has {min(only)!r}"
                + (f" and {len(only) - 1} more" if len(only) > 1 else "")
            )


def _graddrop_distances(a: SavedAdapter, b: SavedAdapter) -> list[LayerDistance]:
    """Weights and biases entry by entry: two GradDrop adapters store them in the same layout."""
    names_a, names_b = graddrop_deltas(a), graddrop_deltas(b)
    _check_same_layers(a, b, set(names_a), set(names_b))
    distances = []
    for name in names_a:
        one, other = read_flat_delta(a, names_a[name]), read_flat_delta(b, names_b[name])
        size = max(_extent(one), _extent(other))
        distances.append(_compare(name, _on(one, size), _on(other, size)))
        distances[-1].overlap = _overlap(one.changed, other.changed)
    return distances


def _extent(delta: FlatDelta) -> int:
    """One above the last position with a value."""
    if delta.positions is None:
        return len(delta.values)
    return int(delta.positions[-1]) + 1 if len(delta.positions) else 0


def _on(delta: FlatDelta, size: int) -> torch.Tensor:
    positions = torch.arange(len(delta.values)) if delta.positions is None else delta.positions
    return torch.zeros(size).index_copy(0, positions, delta.values)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Size of the intersection over that of the union, of sets without repetitions; 1 for two empty ones."""
    common = int(torch.isin(a, b, assume_unique=True).sum())
    union = len(a) + len(b) - common
    return common / union if union else 1.0


def _add_overlaps(a: SavedAdapter, b: SavedAdapter, distances: list[LayerDistance]) -> str | None:
    """Fill in the overlap of two SparseGrad adapters' supports, or say why they have none."""
    if not a.method == b.method == "SPARSEGRAD":
        return f"a {a.method} and a {b.method} adapter have none in common"
    layers_a, layers_b = ({layer.module: layer for layer in saved_layers(adapter)} for adapter in (a, b))
    other_bases = 0
    for distance in distances:
        one, other = layers_a[distance.module], layers_b[distance.module]
        if not _same_basis(one, other):
            other_bases += 1
            continue
        in_one, in_other = one.indices(), other.indices()
        if in_one is not None and in_other is not None:
            distance.overlap = _overlap(in_one, in_other)
    if other_bases:
        return f"{other_bases} of {len(distances)} layers have another basis, in which an entry means something else"
    return None if any(d.overlap is not None for d in distances) else "the whole core trains"


def _same_basis(a: SavedLayer, b: SavedLayer) -> bool:
    for name in "UV":
        one, other = a.matrix(name), b.matrix(name)
        if (one is None) != (other is None):
            return False
        if one is not None and other is not None and not torch.equal(one, other):
            return False
    return True
