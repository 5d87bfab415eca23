"""Values computed from tensors and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Generic, TypeVar

import torch

from .tracing import has_stand_ins

T = TypeVar("T")


class Derived(Generic[T]):
    """A value computed from tensors, and computed again once one of them has been replaced or written to.

    Loading, averaging and broadcasting write into buffers without notice to their module, so the value is kept
    together with the tensors and their versions, which torch raises at every write in place.

    Args:
        compute: Called with the tensors; returns the value.
    """

    def __init__(self, compute: Callable[..., T]) -> None:
        self._compute = compute
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._versions: tuple[tuple[int, int], ...] | None = None
        self._value: T | None = None

    def of(self, *tensors: torch.Tensor) -> T:
        """Return the value for `tensors`.

        Raises:
            RuntimeError: If a model is being exported, and no pass before has prepared the value.
        """
        if has_stand_ins():
            return self._value_in_export()
        # A graph that is being compiled has no versions; an uncompiled call of `of` or `remember` has prepared it.
        if not (self._is_of(tensors) if torch.compiler.is_compiling() else self.knows(*tensors)):
            with torch.inference_mode(False), torch.no_grad():
                self.remember(self._compute(*tensors), *tensors)
        return self._value  # pyright: ignore[reportReturnType]

    def _value_in_export(self) -> T:
        """Return the value for the last tensors: those of the model, for which an export has put in others."""
        if not self.knows(*self._tensors):
            raise RuntimeError(
                "an adapter has changed since its last pass, or there was none, so it cannot be exported: call the "
                "model once with any input, and then `torch.export.export`"
            )
        return self._value  # pyright: ignore[reportReturnType]

    def knows(self, *tensors: torch.Tensor) -> bool:
        """Return whether the value for `tensors`, as they are now, is there."""
        return self._is_of(tensors) and self._versions == _versions(tensors) is not None

    def _is_of(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        return len(tensors) == len(self._tensors) > 0 and all(map(is_, tensors, self._tensors))

    def remember(self, value: T, *tensors: torch.Tensor) -> None:
        """Store `value` as the value for `tensors` in their current version, without computing it."""
        self._value, self._tensors, self._versions = value, tensors, _versions(tensors)

    def __getstate__(self) -> dict[str, object]:
        return {"_compute": self._compute, "_tensors": (), "_versions": None, "_value": None}


def _versions(tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[int, int], ...] | None:
    """Return address and number of writes of tensors, or None if one is an inference tensor, which counts no writes.

    A tensor whose `data` has been replaced, as FSDP2 moves buffers to a GPU, has another address.
    """
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple([(tensor.data_ptr(), tensor._version) for tensor in tensors])
