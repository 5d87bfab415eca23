"""What the next renewal of a support goes by, kept in the Trainer's checkpoints.

The adapter does not hold Σ G̃ since the last renewal: it is many times as large. Without it a run that is resumed
between two renewals renews its supports by what it has seen since, and is not the uninterrupted run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .layer import SparseGradLayer


def save_gradient_sums(layers: list[SparseGradLayer], adapter_name: str, folder: Path, rank: int) -> None:
    """Write the sums of this rank, each of which has seen its own share of the batches; nothing if there are none."""
    tensors = {}
    for layer, gradient_sum in _renewed(layers, adapter_name):
        plan, values, _, _ = layer.adapter(adapter_name)
        tensors[f"{plan.name}.sum"] = gradient_sum.contiguous()
        tensors[f"{plan.name}.values"] = values.detach().contiguous()
    if tensors:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, _path(folder, rank))


def load_gradient_sums(layers: list[SparseGradLayer], adapter_name: str, folder: Path, rank: int) -> bool:
    """Restore the sums that were saved with these very values. Returns whether the folder has them."""
    path = _path(folder, rank)
    renewed = _renewed(layers, adapter_name)
    if not renewed:
        return True
    tensors = load_file(path) if path.exists() else {}
    if not all(_is_of(tensors, layer, adapter_name) for layer, _ in renewed):
        return False
    for layer, gradient_sum in renewed:
        gradient_sum.copy_(tensors[f"{layer.adapter(adapter_name).plan.name}.sum"])
    return True


def _path(folder: Path, rank: int) -> Path:
    return folder / f"sparsegrad_gradient_sums_{rank}.safetensors"


def _renewed(layers: list[SparseGradLayer], adapter_name: str) -> list[tuple[SparseGradLayer, torch.Tensor]]:
    """The layers whose supports are to be renewed, and their sums (r_out, r_in)."""
    sums = [(layer, layer.adapter(adapter_name).support.core_sum) for layer in layers]
    return [(layer, gradient_sum) for layer, gradient_sum in sums if gradient_sum is not None]


def _is_of(tensors: dict[str, Any], layer: SparseGradLayer, adapter_name: str) -> bool:
    """Whether the file is of the checkpoint that the layer was loaded from: its values are the layer's."""
    plan, values, _, _ = layer.adapter(adapter_name)
    saved = tensors.get(f"{plan.name}.values")
    return saved is not None and torch.equal(saved, values.detach().cpu())
