"""The number of optimizer steps that a GradDrop adapter has been trained with, which is part of its checkpoint.

Masks depend on the step, so a run that is resumed must go on counting. One layer of the adapter holds the number, as a
buffer that is saved and loaded with the deltas.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..common.derived import Derived
from ..common.files.adapter_file import ADVICE

_END = ".num_steps"


class StepCount:
    """A count of optimizer steps in a tensor, int64 (1,), that others may write to.

    Args:
        buffers: Dictionary that holds the tensor, of a module's buffers for instance.
        name: Its key.
    """

    def __init__(self, buffers: dict[str, torch.Tensor | None], name: str) -> None:
        self._buffers, self._name = buffers, name
        self._value = Derived(_number)
        if buffers.get(name) is None:
            buffers[name] = torch.zeros(1, dtype=torch.int64)

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor, which others may replace."""
        tensor = self._buffers[self._name]
        assert tensor is not None
        return tensor

    @property
    def value(self) -> int:
        """The number of steps."""
        return self._value.of(self.tensor)

    @value.setter
    def value(self, steps: int) -> None:
        if steps != self.value:
            with torch.no_grad():
                self.tensor.fill_(steps)
            self._value.remember(steps, self.tensor)


def _number(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else int(tensor.item())


def is_step_count(name: str) -> bool:
    """Return whether `name` is that of a step count among an adapter's tensors."""
    return ".graddrop_" in name and name.endswith(_END)


def check_step_counts(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError if a step count among an adapter's tensors is no number of steps."""
    for name, tensor in tensors.items():
        if not is_step_count(name):
            continue
        if tensor.dtype != torch.int64 or tensor.shape != (1,) or tensor.item() < 0:
            raise ValueError(f"{name!r} must be one whole number from 0 on, int64, not {tensor}. {ADVICE}")
