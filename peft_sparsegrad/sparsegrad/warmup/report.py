"""The report of a warm-up."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from ...common.files.atomic import write_text


@dataclasses.dataclass
class GroupReport:
    """The result of a warm-up for the corresponding layers of all blocks.

    Attributes:
        name: Name of the modules, with `*` for the block's number.
        num_layers: Number of layers in the group.
        weight_shape: Shape (out, in) of each weight.
        core_shape: Shape (r_out, r_in) of each core.
        num_values: Number of trained values per layer.
        method: Origin of the basis: `"exact"`, `"sketch"`, `"columns"`, `"svd"`, `"identity"` or `"hosvd"` (from a
            file).
        energy_in_core: Share of a gradient's energy ‖G‖² that the core can express, the median over the layers, in the
            first pass after the bases were found; None if not measured.
        energy_in_support: Share of the same energy on the chosen entries, the median over the layers; None if not
            measured. It is of a batch that has chosen them, too: other batches have less.
        chance_in_core: Entries of the core / entries of the weight: the share in a basis that knows nothing of the
            gradient.
        chance_in_support: Trained values / entries of the weight: the share on entries chosen at random in it.
        core_of_layers: Share in the core by the layer's name, of each layer with a gradient.
        support_of_layers: Share in the support by the layer's name.
        energy: Energy Σ‖G‖² of the gradients in which the basis was found; None if it was not, or per layer.
        spectrum_in: Gradient energy along the leading columns of U, descending, at least as many as are used.
        spectrum_out: The same along the columns of V.
    """

    name: str
    num_layers: int
    weight_shape: tuple[int, int]
    core_shape: tuple[int, int]
    num_values: int
    method: str
    energy_in_core: float | None
    energy_in_support: float | None
    chance_in_core: float
    chance_in_support: float
    core_of_layers: dict[str, float]
    support_of_layers: dict[str, float]
    energy: float | None
    spectrum_in: list[float]
    spectrum_out: list[float]


@dataclasses.dataclass
class WarmUpReport:
    """The result of a warm-up, group by group, which can be printed or converted with `to_json`.

    Attributes:
        adapter_name: Name of the adapter that was warmed up.
        passes: Number of backward passes observed.
        seconds: Wall-clock seconds from the first pass to the choice of the last support.
        groups: Result for each group.
        passed_over: Number of passes and batches that were left out, because their gradient was zero or they had no
            label.
        steps_worth: Number of training steps of one pass each that take as long; None if not measured.
    """

    adapter_name: str
    passes: int
    seconds: float
    groups: list[GroupReport]
    passed_over: int = 0
    steps_worth: float | None = None

    def __str__(self) -> str:
        header = ("modules", "layers", "weight", "core", "values", "basis")
        header += ("energy in core", "by chance", "in support", "by chance")
        rows = [header, *(self._row(group) for group in self.groups)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([f"{self.cost}. Energy: median over the layers.", *lines])

    @property
    def cost(self) -> str:
        """The passes and what they took, as the beginning of a sentence."""
        worth = "" if self.steps_worth is None else f", worth about {self.steps_worth:.0f} training steps of one pass"
        passed_over = f", {self.passed_over} without a gradient passed over" if self.passed_over else ""
        return f"{self.passes} backward passes in {self.seconds:.1f} s{worth}{passed_over}"

    @property
    def summary(self) -> str:
        """The end of the warm-up in one line, for a log."""
        layers = sum(group.num_layers for group in self.groups)
        return (
            f"SparseGrad's warm-up is done, the adapter {self.adapter_name!r} trains from now on: {self.cost}, "
            f"{layers} layers; `print(peft_sparsegrad.warmup_report(model))` has the gradient energy that they hold."
        )

    @staticmethod
    def _row(group: GroupReport) -> tuple[str, ...]:
        sides = [f"{a} x {b}" for a, b in (group.weight_shape, group.core_shape)]
        shares = (group.energy_in_core, group.chance_in_core, group.energy_in_support, group.chance_in_support)
        texts = ["-" if share is None else f"{share:.1%}" for share in shares]
        return (group.name, str(group.num_layers), *sides, str(group.num_values), group.method, *texts)

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
        """Write the report as JSON; an earlier file is replaced at once."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> WarmUpReport:
        """Read what `to_json` wrote."""
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))
