"""Costs of training a model: the seconds of a step, bytes in a step, of the optimizer's state, and on disk."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from .memory import Peak, peak_of, resident_tensors, saved_storages, storages


class StepTimer(TrainerCallback):
    """Times what the method does before training, and each optimisation step up to its last callback.

    The Trainer calls its callbacks in order. With the timer first and its `stop` last, what the callbacks between
    them do at either end of a step counts.

    Attributes:
        warmup_seconds: What the callbacks between them took before the first step.
        seconds: What each step took, from its forward pass on.
    """

    def __init__(self) -> None:
        self.warmup_seconds = 0.0
        self.seconds: list[float] = []
        self.stop = _Stop(self)
        self.started = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    @property
    def median(self) -> float:
        """Median of the steps' seconds."""
        return statistics.median(self.seconds)


class _Stop(TrainerCallback):
    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.timer.warmup_seconds = time.perf_counter() - self.timer.started

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.timer.seconds.append(time.perf_counter() - self.timer.started)


class StepMemory(TrainerCallback):
    """Measures the memory of a step of the training itself, the second that this process takes.

    By then the optimizer has made its state.

    Attributes:
        peak_memory: Bytes at the step's worst moment: weights, gradients, optimizer state, what is kept for the
            backward pass. None in a run of one step.
        optimizer_bytes: Bytes of the tensors in the optimizer's state, or None.
    """

    def __init__(self) -> None:
        self.peak_memory: int | None = None
        self.optimizer_bytes: int | None = None
        self._begun, self._resident = 0, 0
        self._peak: Peak | None = None

    def on_step_begin(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self._begun += 1
        if self._begun == 2:
            self._resident = sum(storages(resident_tensors(model, optimizer)).values())
            self._peak = Peak(next(model.parameters()).device).__enter__()

    def on_step_end(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        if self._peak is not None:
            self._peak.__exit__(None, None, None)
            self.peak_memory, self._peak = self._resident + self._peak.bytes, None
            self.optimizer_bytes = _bytes_of_state(optimizer)


def _bytes_of_state(optimizer: Any) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(storages(value for value in values if isinstance(value, torch.Tensor)).values())


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


def bytes_to_keep(model: nn.Module) -> int:
    """Bytes of the adapter's weights on disk, head included; without an adapter, of the tensors that train."""
    if isinstance(model, PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
