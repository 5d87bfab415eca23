"""The warning that the values hardly move, as with a learning rate that is meant for full fine-tuning.

One in a hundred entries trains, so that the weights as a whole move a tenth of what a step moves each value by. At a
learning rate of full fine-tuning, as transformers' default is, a run ends where it began, and nothing else says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..common.training.backward import in_backward
from ..common.training.optimizer_watcher import OptimizerStep, forget, watch
from ..common.training.pieces import local_part
from ..common.training.zero import is_managed

if TYPE_CHECKING:
    from .adapter import LayerAdapter

_FIRST_LOOK = 8  # optimizer steps; then at each doubling
_FIRST_VERDICT = 32  # two rounds of 16, each with a learning rate that falls, are no reason
_STILL_RISING = 1.4  # a linear warm-up of the learning rate doubles the movement from look to look
# Per step and entry of the weights. SmolLM2 with AdamW moves 2e-5 at a learning rate of 1e-3,
# and less in proportion at a smaller one.
_SMALL = 7e-6


class SmallSteps:
    """Observer of the first optimizer steps, which compares what a step moves with what it moved half as many before.

    While that still rises, the learning rate is being warmed up, and it waits. Once it falls, the learning rate may be
    on its way to zero, and what counts is the largest movement so far. An adapter that was trained before is
    not looked at, since its run may end with a small learning rate, nor is one whose values an engine has taken over.

    Args:
        adapter_name: Name of the adapter.
        adapters: Its part on each layer.
    """

    def __init__(self, adapter_name: str, adapters: list[LayerAdapter]) -> None:
        self._adapter_name, self._adapters = adapter_name, adapters
        self._steps, self._moved_most, self._is_over = 0, 0.0, False
        watch(self)

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Count a step that moves the values, and measure it if its turn has come."""
        first = self._adapters[0]
        if in_backward() or not step.updates(first.values) or first.values.grad is None or not first.is_settled:
            return None
        if self._steps == 0 and (is_managed(first.values) or any(map(torch.any, self._values()))):
            self._end()
            return None
        self._steps += 1
        if self._steps < _FIRST_LOOK or self._steps & (self._steps - 1):
            return None
        before = [values.clone() for values in self._values()]
        return lambda: self._look(before)

    def _values(self) -> list[torch.Tensor]:
        """Return what this rank has of the values of each layer."""
        return [local_part(adapter.values.detach()) for adapter in self._adapters]

    def _look(self, before: list[torch.Tensor]) -> None:
        moved = self._moved(before)
        most_before, self._moved_most = self._moved_most, max(moved, self._moved_most)
        if self._steps >= _FIRST_VERDICT and moved < _STILL_RISING * most_before:
            self._end()
            if self._moved_most < _SMALL:
                self._warn()

    def _end(self) -> None:
        self._is_over = True
        forget(self)

    def _moved(self, before: list[torch.Tensor]) -> float:
        """Return by how much the step has moved the entries of the adapted weights, as a root mean square."""
        pairs = list(zip(self._values(), before, strict=True))
        squares = sum((now - then).float().square().sum().item() for now, then in pairs)
        shares = [adapter.values.numel() / math.prod(adapter.plan.parameter_shape) for adapter in self._adapters]
        entries = sum(then.numel() / share for (_, then), share in zip(pairs, shares, strict=True))
        return math.sqrt(squares / entries) if entries else math.inf

    def _warn(self) -> None:
        warnings.warn(
            f"SparseGrad: after {self._steps} optimizer steps the values of the adapter {self._adapter_name!r} hardly "
            "move, as with a learning rate of full fine-tuning. Few entries train, and they need a larger one: try "
            "lr=1e-3 with AdamW.",
            stacklevel=2,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._is_over:
            watch(self)  # a copy trains by itself
