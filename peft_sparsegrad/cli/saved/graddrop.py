"""GradDrop adapters as they are saved, and what `inspect` says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...functional import unpack_support
from ...graddrop.step_count import is_step_count
from ..errors import InputError
from ..output import percent
from .adapter import SavedAdapter, grouped_by_module
from .concentration import fewest_with_share
from .method import EntriesDelta, SavedMethod, Table, WeightLayout


@dataclass
class ChangedTensor:
    """One weight or bias.

    Attributes:
        parameter: Its name in the base model.
        changed: Entries that are not where they were.
        entries: All of its entries.
        share: The changed ones among them.
        norm: ‖Δ‖.
        largest: Largest magnitude of a change.
        hold_90_percent: Fewest entries with 90% of ‖Δ‖².
        non_finite: Changes that are NaN or infinite.
    """

    parameter: str
    changed: int
    entries: int
    share: float
    norm: float
    largest: float
    hold_90_percent: int
    non_finite: int


class SavedGradDrop(SavedMethod):
    """Deltas of weights and biases, whole or as values with a `_support` and a `_shape`."""

    peft_type = "GRADDROP"
    converts_to_lora = True
    plots = ("active",)

    def __init__(self, adapter: SavedAdapter) -> None:
        super().__init__(adapter)
        self._parts: dict[str, dict[str, str]] = {}
        deltas = [name for name in adapter.tensors if not is_step_count(name)]
        for module, parts in grouped_by_module(deltas, "graddrop_adapter.").items():
            for part, name in parts.items():
                kind, _, role = part.partition("_delta")
                role = role.removeprefix("_")
                self._parts.setdefault(f"{module}.{kind}", {})[role or "delta"] = name
        for parameter, parts in self._parts.items():
            if set(parts) not in ({"delta"}, {"delta", "support", "shape"}):
                raise InputError(
                    f"{adapter.weights_path} is damaged: {parameter!r} has only {sorted(parts)}, and should have a "
                    "delta alone, or a delta with its support and its shape; save the adapter again"
                )
        if not self._parts:
            raise InputError(f"{adapter.weights_path} holds no tensor of GradDrop")

    @property
    def modules(self) -> dict[str, tuple[int, int] | None]:
        return {name.removesuffix(".weight"): None for name in self._parts if name.endswith(".weight")}

    @property
    def parameters(self) -> list[str]:
        return list(self._parts)

    def entries(self, parameter: str) -> EntriesDelta:
        parts = self._parts[parameter]
        stored = self.adapter.tensor(parts["delta"]).float()
        if "support" not in parts:
            return EntriesDelta(None, stored.flatten(), tuple(stored.shape))
        if stored.ndim != 1:
            raise InputError(
                f"{self.adapter.weights_path} is damaged at {parts['delta']!r}: values beside a support should be a "
                f"vector, not of shape {tuple(stored.shape)}; save the adapter again"
            )
        shape = self._shape(parts)
        try:
            indices = unpack_support(self.adapter.tensor(parts["support"]), shape.numel(), stored.numel())
        except ValueError as error:
            raise InputError(f"{self.adapter.weights_path} is damaged at {parts['support']!r}: {error}") from error
        return EntriesDelta(indices, stored, tuple(shape))

    def delta(self, module: str, layout: WeightLayout) -> torch.Tensor:
        entries = self.entries(f"{module}.weight")
        stored = layout.shape[::-1] if layout.transposed else layout.shape
        if entries.shape != stored:
            raise InputError(
                f"{self.adapter.folder}: the delta of {module!r} is of shape {entries.shape}, not of a weight of "
                f"shape {stored}"
            )
        return entries.dense().T if layout.transposed else entries.dense()

    def facts(self) -> dict[str, list[Any]]:
        return {"tensors": [self._changed(parameter) for parameter in self.parameters]}

    @classmethod
    def tables(cls, facts: dict[str, Any]) -> list[Table]:
        columns = ("parameter", "changed", "of", "share", "‖Δ‖", "largest", "hold 90% of ‖Δ‖²")
        rows = [
            (
                *(each.parameter, f"{each.changed:,}", f"{each.entries:,}", percent(each.share)),
                *(f"{each.norm:.3g}", f"{each.largest:.2g}", f"{each.hold_90_percent:,}"),
            )
            for each in facts["tensors"]
        ]
        return [Table("Changes of the weights", columns, rows)]

    def _shape(self, parts: Mapping[str, str]) -> torch.Size:
        stored = self.adapter.tensor(parts["shape"])
        if stored.dtype.is_floating_point or stored.ndim != 1 or bool((stored < 0).any()):
            raise InputError(f"{self.adapter.weights_path} is damaged at {parts['shape']!r}: {stored} is no shape")
        return torch.Size(stored.tolist())

    def _changed(self, parameter: str) -> ChangedTensor:
        delta = self.entries(parameter)
        values, entries = delta.values, torch.Size(delta.shape).numel()
        changed = int(torch.count_nonzero(values))
        return ChangedTensor(
            parameter=parameter,
            changed=changed,
            entries=entries,
            share=changed / entries if entries else 0.0,
            norm=values.double().norm().item(),
            largest=values.abs().max().item() if values.numel() else 0.0,
            hold_90_percent=fewest_with_share(values, 0.9),
            non_finite=int((~torch.isfinite(values)).sum()),
        )
