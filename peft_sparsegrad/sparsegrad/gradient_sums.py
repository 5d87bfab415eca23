"""The gradient sums that the next renewal of a support goes by, kept in the Trainer's checkpoints.

The adapter does not hold Σ G̃ since the last renewal: it is many times as large. Without it a run that is resumed
between two renewals renews its supports by what it has seen since, and is not the uninterrupted run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .adapter import LayerAdapter


def save_gradient_sums(adapters: list[LayerAdapter], folder: Path, rank: int) -> None:
    """Write the sums of this rank, each of which has seen its own share of the batches; nothing if there are none."""
    tensors = {}
    for adapter, gradient_sum in _renewed(adapters):
        tensors[f"{adapter.plan.name}.sum"] = gradient_sum.contiguous()
        tensors[f"{adapter.plan.name}.values"] = adapter.values.detach().contiguous()
    if tensors:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, _path(folder, rank))


def load_gradient_sums(adapters: list[LayerAdapter], folder: Path, rank: int) -> bool:
    """Restore the sums that were saved with these very values. Returns whether the folder has them."""
    path = _path(folder, rank)
    renewed = _renewed(adapters)
    if not renewed:
        return True
    tensors = load_file(path) if path.exists() else {}
    if not all(_is_of(tensors, adapter) for adapter, _ in renewed):
        return False
    for adapter, gradient_sum in renewed:
        gradient_sum.copy_(tensors[f"{adapter.plan.name}.sum"])
    return True


def _path(folder: Path, rank: int) -> Path:
    return folder / f"sparsegrad_gradient_sums_{rank}.safetensors"


def _renewed(adapters: list[LayerAdapter]) -> list[tuple[LayerAdapter, torch.Tensor]]:
    """Return the adapters whose supports are renewed, with their sums (r_out, r_in)."""
    sums = [(adapter, adapter.gradient_sum) for adapter in adapters]
    return [(adapter, gradient_sum) for adapter, gradient_sum in sums if gradient_sum is not None]


def _is_of(tensors: dict[str, Any], adapter: LayerAdapter) -> bool:
    """Return whether the file is of the checkpoint that the adapter was loaded from: the values are the same."""
    saved = tensors.get(f"{adapter.plan.name}.values")
    return saved is not None and torch.equal(saved, adapter.values.detach().cpu())
