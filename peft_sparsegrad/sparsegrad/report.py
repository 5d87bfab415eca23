"""What a warm-up found."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any


@dataclasses.dataclass
class GroupReport:
    """One group of layers with common transition matrices.

    Attributes:
        name: Name of its modules, `*` for the block's number.
        num_layers: Layers in the group.
        weight_shape: (out, in).
        core_shape: (r_out, r_in).
        num_values: Trained values per layer.
        method: How the basis was found: `"exact"`, `"sketch"`, `"svd"`, `"identity"` or `"hosvd"` (from a file).
        energy_in_core: Share of the warm-up gradients' energy Σ‖G‖² that the core can express; None if not measured.
        energy_in_support: Share of it on the chosen entries; None if not measured.
        spectrum_in: Gradient energy along the columns of U, descending.
        spectrum_out: Gradient energy along the columns of V, descending.
    """

    name: str
    num_layers: int
    weight_shape: tuple[int, int]
    core_shape: tuple[int, int]
    num_values: int
    method: str
    energy_in_core: float | None
    energy_in_support: float | None
    spectrum_in: list[float]
    spectrum_out: list[float]


@dataclasses.dataclass
class WarmUpReport:
    """What a warm-up found, group by group. `print` it, or keep it with `to_json`.

    Attributes:
        adapter_name: The adapter that was warmed up.
        passes: Backward passes watched, all sweeps together.
        seconds: Wall-clock seconds from the first pass to the last support.
        groups: One entry per group.
    """

    adapter_name: str
    passes: int
    seconds: float
    groups: list[GroupReport]

    def __str__(self) -> str:
        header = ("modules", "layers", "weight", "core", "values", "basis", "energy in core", "in support")
        rows = [header, *(self._row(group) for group in self.groups)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([f"{self.passes} backward passes in {self.seconds:.1f} s", *lines])

    @staticmethod
    def _row(group: GroupReport) -> tuple[str, ...]:
        sides = [f"{a} x {b}" for a, b in (group.weight_shape, group.core_shape)]
        shares = ["-" if s is None else f"{s:.1%}" for s in (group.energy_in_core, group.energy_in_support)]
        return (group.name, str(group.num_layers), *sides, str(group.num_values), group.method, *shares)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> WarmUpReport:
        groups = [
            GroupReport(
                **{
                    **group,
                    "weight_shape": tuple(group["weight_shape"]),
                    "core_shape": tuple(group["core_shape"]),
                }
            )
            for group in entries["groups"]
        ]
        return cls(**{**entries, "groups": groups})

    def to_json(self, path: str | os.PathLike[str]) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> WarmUpReport:
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))
