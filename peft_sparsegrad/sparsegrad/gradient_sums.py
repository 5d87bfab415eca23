"""The gradient sums from which the next renewal chooses a support, kept in the Trainer's checkpoints.

The adapter file does not hold Σ G̃ since the last renewal, which is many times as large as the adapter. Without it, a
run that is resumed between two renewals would renew its supports by the gradients since the restart only, and would
differ from the uninterrupted run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .adapter import LayerAdapter


def save_gradient_sums(adapters: list[LayerAdapter], folder: Path, rank: int) -> None:
    """Write the sums of this rank, which cover its own share of the batches; write nothing if there are none."""
    tensors = {}
    for adapter, gradient_sum in _renewed(adapters):
        tensors[f"{adapter.plan.name}.sum"] = gradient_sum.contiguous()
        tensors[f"{adapter.plan.name}.values"] = adapter.values.detach().contiguous()
    if tensors:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, _path(folder, rank))


def load_gradient_sums(adapters: list[LayerAdapter], folder: Path, rank: int) -> bool:
    """Restore the sums that were saved with these values, and return whether the folder has them."""
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
    """Return whether a file belongs to the checkpoint that the adapter was loaded from, by comparing the values."""
    saved = tensors.get(f"{adapter.plan.name}.values")
    return saved is not None and torch.equal(saved, adapter.values.detach().cpu())
