"""Costs of a trained model: values, bytes on disk, bytes in a training step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from benchmarks.memory import peak_of, resident_tensors, saved_storages, storages

from .head import in_head


def count_trained(model: nn.Module) -> dict[str, int]:
    """Count the values that train in the task head and elsewhere."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[in_head(name)] += parameter.numel() * parameter.requires_grad
    return {"trained_parameters": counts[False], "trained_head_parameters": counts[True]}


def bytes_to_keep(model: nn.Module, folder: Path) -> int:
    """Bytes of the adapter's weights on disk, head included; without an adapter, of the tensors that train."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
        return (folder / "adapter_model.safetensors").stat().st_size
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def step_memory(model: nn.Module, optimizer: Any, forward: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Bytes of one more training step.

    Args:
        model: In training mode, with its gradients cleared.
        optimizer: Of the model; it has made its state.
        forward: Runs a forward pass and returns the loss.

    Returns:
        `kept_memory`, what the forward pass keeps for the backward pass and is not there anyway, and `peak_memory`,
        the step's worst moment: weights, optimizer state and batch included.
    """

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    kept, standing = saved_storages(forward)
    resident = sum({**standing, **storages(resident_tensors(model, optimizer))}.values())
    return {
        "kept_memory": sum(kept.values()),
        "peak_memory": resident + peak_of(step, next(model.parameters()).device),
    }
