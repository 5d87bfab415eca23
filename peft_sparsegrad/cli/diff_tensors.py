"""Tensors of two adapters that differ, by their names."""

from __future__ import annotations

from dataclasses import dataclass

from .saved.adapter import SavedAdapter
from .saved.methods import METHODS

_PREFIXES = tuple(f"{method.lower()}_" for method in METHODS)


@dataclass
class TensorDistance:
    """One tensor that differs.

    Attributes:
        name: Its name.
        norm_a: ‖A‖; None if only B has it, or the shapes differ.
        norm_b: ‖B‖; None if only A has it, or the shapes differ.
        distance: ‖A − B‖ / ‖A‖; None if one of the norms is, or if A is zero.
        note: What differs where the norms are not given.
    """

    name: str
    norm_a: float | None = None
    norm_b: float | None = None
    distance: float | None = None
    note: str | None = None

    @property
    def carries_delta(self) -> bool:
        """True if the tensor is part of the change of a weight, as SparseGrad, GradDrop or LoRA store it."""
        return any(part.startswith(_PREFIXES) for part in self.name.split("."))


def tensor_distances(a: SavedAdapter, b: SavedAdapter) -> list[TensorDistance]:
    """The tensors that are not the same in both, those that only one has included."""
    found = [_distance(a, b, name) for name in {**a.tensors, **b.tensors}]
    return [distance for distance in found if distance is not None]


def _distance(a: SavedAdapter, b: SavedAdapter, name: str) -> TensorDistance | None:
    """None if the tensor is the same in both."""
    if name not in a.tensors or name not in b.tensors:
        return TensorDistance(name, note="only in A" if name in a.tensors else "only in B")
    if a.tensors[name].shape != b.tensors[name].shape:
        return TensorDistance(name, note=f"{a.tensors[name].shape} and {b.tensors[name].shape}")
    one, other = a.tensor(name).double(), b.tensor(name).double()
    if bool((one == other).all()):
        return None
    norm = one.norm().item()
    return TensorDistance(name, norm, other.norm().item(), (one - other).norm().item() / norm if norm else None)
