"""What an adapted layer holds besides its trained values: transition matrices and support.

Everything that a checkpoint must carry is a persistent buffer whose shape is fixed when the adapter is injected; what
is derived from it is cached and dropped when a buffer is replaced or loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..functional import pack_support, spread_support, unpack_support


class TransitionMatrices(nn.Module):
    """The pair U (in, r_in), V (out, r_out) that a group of layers shares.

    One layer of the group, the owner, registers this module, so the pair is in the state dict once; the others hold a
    plain reference. Float32 whatever the base model's dtype: rounding costs orthogonality. Until the warm-up has
    filled them in, the columns are those of the identity.

    Attributes:
        U: Input transition matrix, or None for the identity.
        V: Output transition matrix, or None for the identity.
    """

    U: torch.Tensor | None
    V: torch.Tensor | None

    def __init__(self, out_features: int, in_features: int, core_shape: tuple[int, int], identity: bool) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.core_shape = core_shape
        self.register_buffer("U", None if identity else torch.eye(in_features, core_shape[1]))
        self.register_buffer("V", None if identity else torch.eye(out_features, core_shape[0]))
        self._replicas: dict[tuple[torch.device, torch.dtype], tuple[Any, ...]] = {}

    def fill(self, U: torch.Tensor, V: torch.Tensor) -> None:
        """Replace the columns in place, so that everything that holds the buffers sees them."""
        if self.U is None or self.V is None:
            raise ValueError("the identity basis has no columns to fill in")
        self.U.copy_(U)
        self.V.copy_(V)
        self._replicas.clear()

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """U and V on a device and in a dtype; copies are kept, one per device and dtype."""
        if self.U is None or self.V is None or (self.U.device == device and self.U.dtype == dtype):
            return self.U, self.V
        if torch.compiler.is_compiling():
            return self.U.to(device, dtype), self.V.to(device, dtype)
        source_u, source_v, *copies = self._replicas.get((device, dtype), (None, None))
        if source_u is not self.U or source_v is not self.V:
            copies = [self.U.to(device, dtype), self.V.to(device, dtype)]
            self._replicas[device, dtype] = (self.U, self.V, *copies)
        return copies[0], copies[1]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._replicas.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replicas": {}}


class Support(nn.Module):
    """Which entries of a layer's core train, and whether that has been settled.

    Attributes:
        packed: Bit mask or int32 indices, see `pack_support`; None where the whole core trains (dynamic support).
        settled: One byte, 1 once the basis and the support are final. In the state dict, because `load_adapter` into
            an existing name does not read the configuration again.
    """

    packed: torch.Tensor | None
    settled: torch.Tensor

    def __init__(self, num_entries: int, k: int, dynamic: bool, settled: bool) -> None:
        super().__init__()
        self.num_entries, self.k = num_entries, k
        initial = None if dynamic else pack_support(spread_support(num_entries, k), num_entries)
        self.register_buffer("packed", initial)
        self.register_buffer("settled", torch.tensor([settled], dtype=torch.uint8))
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

    def unsettle(self) -> None:
        """Open the support for a warm-up again."""
        self.settled.fill_(0)
        self.forget()

    def forget(self) -> None:
        """Drop what was derived from the buffers, after one of them has been written to."""
        self._unpacked, self._settled = (None, None), (None, False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": (None, None), "_settled": (None, False)}
