"""Modules whose buffers no move to the meta device takes away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class KeptBuffers(nn.Module):
    """A module whose buffers stay where they are when its parameters go to the meta device.

    accelerate's FSDP2 moves a model there, shards it, and loads what `state_dict()` then names, all of which it takes
    for sharded. Buffers are not: a basis belongs to several blocks. So, until something is loaded or the module goes
    to another device, `state_dict()` leaves the kept buffers out, and `load_state_dict` does not ask for them.
    """

    _is_on_meta = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeptBuffers:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and not buffer.is_meta}
        super()._apply(fn, recurse)
        taken = {name: buffer for name, buffer in kept.items() if self.get_buffer(name).is_meta}
        self._buffers.update(taken)
        self._is_on_meta = bool(taken)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_on_meta:
            for name in self._buffers:
                destination.pop(f"{prefix}{name}", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self._is_on_meta:
            self._is_on_meta = False
            own = {f"{prefix}{name}": buffer for name, buffer in self._buffers.items() if buffer is not None}
            state_dict = {**own, **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
