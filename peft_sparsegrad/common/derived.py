"""Values computed from a tensor and kept until the tensor changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Derived(Generic[T]):
    """A value computed from a tensor, and computed again once the tensor has been replaced or written to.

    Loading, averaging and broadcasting write into buffers without notice to their module, so the value is kept
    together with the tensor and its version, which torch raises at every write in place.

    Args:
        compute: Called with the tensor; returns the value.
    """

    def __init__(self, compute: Callable[[torch.Tensor], T]) -> None:
        self._compute = compute
        self._tensor: torch.Tensor | None = None
        self._version: int | None = None
        self._value: T | None = None

    def of(self, tensor: torch.Tensor) -> T:
        """Return the value for `tensor`."""
        # A graph that is being compiled has no versions; an uncompiled call of `of` or `remember` has prepared it.
        is_current = torch.compiler.is_compiling() or self._version == _version(tensor) is not None
        if self._tensor is not tensor or not is_current:
            with torch.inference_mode(False), torch.no_grad():
                self.remember(tensor, self._compute(tensor))
        return self._value  # pyright: ignore[reportReturnType]

    def remember(self, tensor: torch.Tensor, value: T) -> None:
        """Store `value` as the value for `tensor` in its current version, without computing it."""
        self._tensor, self._version, self._value = tensor, _version(tensor), value

    def __getstate__(self) -> dict[str, object]:
        return {"_compute": self._compute, "_tensor": None, "_version": None, "_value": None}


def _version(tensor: torch.Tensor) -> int | None:
    """Return the number of writes to a tensor, or None for an inference tensor, which does not count them."""
    return None if tensor.is_inference() else tensor._version
