"""What `inspect` says of a GradDrop adapter: which share of every weight and bias changed, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .inspect_sparsegrad import fewest_with_share
from .saved.adapter import SavedAdapter
from .saved.deltas import graddrop_deltas, read_flat_delta


@dataclass
class ChangedTensor:
    """One weight or bias.

    Attributes:
        parameter: Its name in the base model.
        changed: Entries that are not where they were.
        entries: All of its entries, up to 7 too many where the changed ones are a bit mask; None where they are
            positions.
        share: The changed ones among them; None likewise.
        norm: ‖Δ‖.
        largest: Largest magnitude of a change.
        hold_90_percent: Fewest entries with 90% of ‖Δ‖².
        non_finite: Changes that are NaN or infinite.
    """

    parameter: str
    changed: int
    entries: int | None
    share: float | None
    norm: float
    largest: float
    hold_90_percent: int
    non_finite: int


def changed_tensors(adapter: SavedAdapter) -> list[ChangedTensor]:
    """Look at every delta, one at a time."""
    return [_changed_tensor(adapter, name, parts) for name, parts in graddrop_deltas(adapter).items()]


def _changed_tensor(adapter: SavedAdapter, parameter: str, parts: dict[str, str]) -> ChangedTensor:
    values = read_flat_delta(adapter, parts).values
    changed, entries = int(torch.count_nonzero(values)), _entries(adapter, parts)
    return ChangedTensor(
        parameter=parameter,
        changed=changed,
        entries=entries,
        share=None if not entries else changed / entries,
        norm=values.double().norm().item(),
        largest=values.abs().max().item() if values.numel() else 0.0,
        hold_90_percent=fewest_with_share(values, 0.9),
        non_finite=int((~torch.isfinite(values)).sum()),
    )


def _entries(adapter: SavedAdapter, parts: dict[str, str]) -> int | None:
    """Entries of the parameter: of what is stored, or as many as the mask has bits."""
    if "support" not in parts:
        return adapter.tensors[parts["delta"]].numel
    support = adapter.tensors[parts["support"]]
    return 8 * support.numel if support.dtype == "U8" else None
