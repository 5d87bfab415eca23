"""The distance of two adapters' deltas, layer by layer, and the overlap of their supports."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .base_models import weight_layouts
from .errors import InputError
from .saved.method import SavedMethod, SavedSupport, WeightLayout


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


def layer_distances(a: SavedMethod, b: SavedMethod, base: str | None) -> tuple[list[LayerDistance], str | None]:
    """Compare the weights of two adapters or, where one method stores both entry by entry, the biases too.

    Returns:
        The layers, and why supports were not compared, or None if they were.

    Raises:
        InputError: If they are on different layers, or the shape of a weight is not known.
    """
    if type(a) is type(b) and a.parameters:
        return _parameter_distances(a, b), None
    layouts = _layouts(a, b, base)
    distances = [_compare(name, a.delta(name, layout), b.delta(name, layout)) for name, layout in layouts.items()]
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


def _layouts(a: SavedMethod, b: SavedMethod, base: str | None) -> dict[str, WeightLayout]:
    """Return the layout of every weight that both adapters change, from their files or else from the base model."""
    shapes_a, shapes_b = a.modules, b.modules
    _check_same_layers(a, b, set(shapes_a), set(shapes_b))
    if base is None and None not in (*shapes_a.values(), *shapes_b.values()):
        found = {module: WeightLayout(shape) for module, shape in shapes_a.items() if shape is not None}
    else:
        every = weight_layouts(a.adapter, base)
        if missing := shapes_a.keys() - every.keys():
            raise InputError(f"the base model has no linear layer {min(missing)!r}")
        found = {module: every[module] for module in shapes_a}
    for module, layout in found.items():
        if {shapes_a[module], shapes_b[module]} - {None, layout.shape}:
            raise InputError(f"{module!r} has a weight of shape {shapes_a[module]} in A and {shapes_b[module]} in B")
    return found


def _check_same_layers(a: SavedMethod, b: SavedMethod, in_a: set[str], in_b: set[str]) -> None:
    for method, only in ((a, in_a - in_b), (b, in_b - in_a)):
        if only:
            raise InputError(
                f"the adapters are on different layers: only {method.adapter.folder} has {min(only)!r}"
                + (f" and {len(only) - 1} more" if len(only) > 1 else "")
            )


def _parameter_distances(a: SavedMethod, b: SavedMethod) -> list[LayerDistance]:
    """Compare weights and biases entry by entry, in the one layout of both."""
    _check_same_layers(a, b, set(a.parameters), set(b.parameters))
    distances = []
    for name in a.parameters:
        one, other = a.entries(name), b.entries(name)
        if one.shape != other.shape:
            raise InputError(f"{name!r} has the shape {one.shape} in A and {other.shape} in B")
        distances.append(_compare(name, one.dense(), other.dense()))
        distances[-1].overlap = _overlap(one.changed, other.changed)
    return distances


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return intersection over union of two sets without repetitions; 1 for two empty ones."""
    common = int(torch.isin(a, b, assume_unique=True).sum())
    union = len(a) + len(b) - common
    return common / union if union else 1.0


def _add_overlaps(a: SavedMethod, b: SavedMethod, distances: list[LayerDistance]) -> str | None:
    """Fill in the overlap of two adapters' supports, or say why they have none."""
    other_bases = 0
    for distance in distances:
        one, other = a.support(distance.module), b.support(distance.module)
        if one is None or other is None:
            return f"a {a.peft_type} and a {b.peft_type} adapter have none in common"
        if not _same_basis(one, other):
            other_bases += 1
        elif one.indices is not None and other.indices is not None:
            distance.overlap = _overlap(one.indices, other.indices)
    if other_bases:
        return f"{other_bases} of {len(distances)} layers have another basis, in which an entry means something else"
    return None if any(d.overlap is not None for d in distances) else "the whole core trains"


def _same_basis(a: SavedSupport, b: SavedSupport) -> bool:
    for one, other in zip(a.basis, b.basis, strict=True):
        if (one is None) != (other is None):
            return False
        if one is not None and other is not None and not torch.equal(one, other):
            return False
    return True
