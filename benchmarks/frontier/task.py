"""The interface of a task: its model, its batches, its loss and its scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

Batch = dict[str, torch.Tensor]


class FrontierTask(ABC):
    """A task in local files, read and made into tokens once for each process. `METRICS` says what its score is.

    Args:
        model: Folder of the checkpoint.
        data: Folder of the data.

    Attributes:
        base: The checkpoint in float32 on the CPU.
    """

    base: Any

    @abstractmethod
    def __init__(self, model: Path, data: Path) -> None: ...

    @abstractmethod
    def batches(self, batch_size: int, steps: int, seed: int) -> list[Batch]:
        """Return the training batches of a run, on the CPU."""

    @abstractmethod
    def longest_batch(self, batch_size: int) -> Batch:
        """Return a batch of the greatest size that training has, which step time and memory are measured on."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch on the model's device."""

    @abstractmethod
    def scores(self, model: Any) -> dict[str, Any]:
        """Return "score" on the final rows, "search_score" on the search's rows (higher is better), and more."""

    def settle(self, model: nn.Module, seed: int) -> None:  # noqa: B027
        """Train the new task head of a fresh model alone, if there is one."""


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
