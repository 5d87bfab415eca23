"""What the tests of the command line have in common: the real layers of a model, and damage to an adapter's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def delta_layers(model) -> dict[str, Any]:
    """Name in the base model to adapted layer, for every layer that can tell its own delta."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if hasattr(module, "get_delta_weight")}


def deltas(model) -> dict[str, torch.Tensor]:
    """ΔW (out, in) of every adapted linear layer."""
    found = {}
    for name, module in delta_layers(model).items():
        delta = module.get_delta_weight("default").detach()
        found[name] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
    return found


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Return a damage to the first tensor, by name, that ends in `part`: it is replaced, or removed for None."""

    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        key = next(key for key in sorted(tensors) if key.endswith(f".{part}"))
        new = change(tensors.pop(key))
        if new is not None:
            tensors[key] = new.contiguous()
        save_file(tensors, path / WEIGHTS)

    return damage
