"""What an adapted layer holds besides its trained values: transition matrices and support.

Everything that a checkpoint must carry is a persistent buffer whose shape is fixed when the adapter is injected; what
is derived from it is cached and dropped when a buffer is replaced or loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..functional import pack_support, spread_support, unpack_support


class TransitionMatrices(nn.Module):
    """The pair U (in, r_in), V (out, r_out) that a group of layers shares; either may be the identity.

    One layer of the group, the owner, registers this module, so the pair is in the state dict once; the others hold a
    plain reference. Float32 whatever the base model's dtype: rounding costs orthogonality. Until the warm-up has
    filled them in, the columns are those of the identity.

    Attributes:
        U: Input transition matrix, or None for the identity.
        V: Output transition matrix, or None for the identity.
    """

    U: torch.Tensor | None
    V: torch.Tensor | None

    def __init__(self, out_features: int, in_features: int, ranks: tuple[int | None, int | None]) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.ranks = ranks
        r_out, r_in = ranks
        self.register_buffer("U", None if r_in is None else torch.eye(in_features, r_in))
        self.register_buffer("V", None if r_out is None else torch.eye(out_features, r_out))
        self._replicas: dict[tuple[str, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def fill(self, U: torch.Tensor | None, V: torch.Tensor | None) -> None:
        """Replace the columns in place, so that everything that holds the buffers sees them; None for the identity."""
        for name, columns in {"U": U, "V": V}.items():
            buffer = getattr(self, name)
            if (buffer is None) != (columns is None):
                raise ValueError(f"{name} is the identity on one side and has columns on the other")
            if buffer is not None:
                buffer.copy_(columns)
        self._replicas.clear()

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """U and V on a device and in a dtype; copies are kept, one per device and dtype."""
        return self._on("U", self.U, device, dtype), self._on("V", self.V, device, dtype)

    def _on(
        self, name: str, matrix: torch.Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if matrix is None or (matrix.device == device and matrix.dtype == dtype):
            return matrix
        if torch.compiler.is_compiling():
            return matrix.to(device, dtype)
        source, copy = self._replicas.get((name, device, dtype), (None, None))
        if copy is None or source is not matrix:
            copy = matrix.to(device, dtype)
            self._replicas[name, device, dtype] = (matrix, copy)
        return copy

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._replicas.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replicas": {}}


class Support(nn.Module):
    """Which entries of a layer's core train, and whether that has been settled.

    Attributes:
        packed: Bit mask or int32 indices, see `pack_support`; None where the whole core trains (dynamic support).
        settled: One byte, 1 once the basis is final and the support was chosen. In the state dict, because
            `load_adapter` into an existing name does not read the configuration again.
        steps: Optimizer steps that the values have taken since.
        core_sum: Σ G̃ (r_out, r_in) of the backward passes since the support was chosen or renewed, float32; None where
            it is not to be renewed. In no checkpoint, and no buffer: DDP overwrites those with rank 0's, and each
            rank sums over its own share of the batches.
    """

    packed: torch.Tensor | None
    settled: torch.Tensor
    counted: torch.Tensor

    def __init__(
        self, core_shape: tuple[int, int], k: int, dynamic: bool, settled: bool, regrows: bool = False
    ) -> None:
        super().__init__()
        self.num_entries, self.k = core_shape[0] * core_shape[1], k
        initial = None if dynamic else pack_support(spread_support(self.num_entries, k), self.num_entries)
        self.register_buffer("packed", initial)
        self.register_buffer("settled", torch.tensor([settled], dtype=torch.uint8))
        self.core_sum = torch.zeros(core_shape, dtype=torch.float32) if regrows else None
        self.register_buffer("counted", torch.zeros(1, dtype=torch.int64))  # `steps`, when it was saved
        self.steps = 0
        self._unpacked: tuple[Any, Any] = (None, None)
        self._settled: tuple[Any, bool] = (None, False)

    @property
    def indices(self) -> torch.Tensor | None:
        """Sorted flat positions in the core, int64 (k,), or None where the whole core trains."""
        if self.packed is not self._unpacked[0]:
            self._unpacked = (self.packed, unpack_support(self.packed, self.num_entries, self.k))  # pyright: ignore
        return self._unpacked[1]

    @property
    def is_settled(self) -> bool:
        """`settled` as a bool, read from the device only when the buffer has been replaced."""
        if self.settled is not self._settled[0]:
            self._settled = (self.settled, bool(self.settled.item()))
        return self._settled[1]

    def settle(self, indices: torch.Tensor | None = None) -> None:
        """Make the support final, in place; `indices` (k,) sorted, or None to keep the entries as they are."""
        if indices is not None:
            assert self.packed is not None, "a dynamic support has no indices"
            self.packed.copy_(pack_support(indices, self.num_entries))
        self.settled.fill_(1)
        self.forget()
        _ = self.indices, self.is_settled  # now, and not in a compiled forward pass, whose graph they would break

    def unsettle(self) -> None:
        """Open the support for a warm-up again."""
        self.settled.fill_(0)
        self.forget()

    def forget(self) -> None:
        """Drop what was derived from the buffers, after one of them has been written to."""
        self._unpacked, self._settled = (None, None), (None, False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Support:
        super()._apply(fn, recurse)
        if self.core_sum is not None and self.core_sum.device != self.settled.device:
            move = torch.zeros_like if self.core_sum.is_meta else torch.Tensor.to
            self.core_sum = move(self.core_sum, device=self.settled.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()
        self.steps = 0 if self.counted.is_meta else int(self.counted.item())
        if self.core_sum is not None:  # what was summed belongs to another support, or is on the meta device
            self.core_sum = torch.zeros_like(self.core_sum, device=self.settled.device)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.counted.fill_(self.steps)
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": (None, None), "_settled": (None, False)}
