"""The basis of a group of layers."""

from __future__ import annotations

from functools import partial

import torch

from ..common.derived import Derived
from ..common.kept_buffers import KeptBuffers
from ..functional import Side, rounded, side_in


class Basis(KeptBuffers):
    """The pair of transition matrices U (in, r_in) and V (out, r_out) that the layers of a group share.

    One layer of the group, the owner, registers this module, so the pair is in the state dict once; the others hold a
    plain reference. The matrices are float32 in a base model of any dtype. But for square ones float16 can hold their
    entries, and does in the adapter's file. Until the warm-up fills them in, the columns are those of the identity.

    Args:
        weight_shape: (out, in) of the group's weights.
        ranks: Columns (r_out, r_in) of V and U; None for a side that keeps the weight's own basis.
        selects: True if U is not a matrix but a choice of the weight's columns.

    Attributes:
        U: Input transition matrix, or the numbers of the chosen columns as ascending int32 (r_in,), or None for the
            identity.
        V: Output transition matrix, or None for the identity.
    """

    U: torch.Tensor | None
    V: torch.Tensor | None

    def __init__(
        self, weight_shape: tuple[int, int], ranks: tuple[int | None, int | None], selects: bool = False
    ) -> None:
        super().__init__()
        self.weight_shape, self.ranks, self.selects = weight_shape, ranks, selects
        (out_features, in_features), (r_out, r_in) = weight_shape, ranks
        U = None if r_in is None else torch.eye(in_features, r_in, device="cpu")
        U = torch.arange(r_in, dtype=torch.int32, device="cpu") if selects and r_in is not None else U
        self.register_buffer("U", U)
        self.register_buffer("V", None if r_out is None else torch.eye(out_features, r_out, device="cpu"))
        self._sides: dict[torch.dtype, Derived[tuple[Side, Side]]] = {}

    def sides_in(self, dtype: torch.dtype) -> tuple[Side, Side]:
        """Return (U, V) for products in a dtype, see `side_in`; cast once, and again when the basis has changed."""
        if torch.compiler.is_compiling():
            return self.U, self.V
        if dtype not in self._sides:
            self._sides[dtype] = Derived(partial(_sides_in, dtype, self.U is not None, self.V is not None))
        return self._sides[dtype].of(*(side for side in (self.U, self.V) if side is not None))

    def choose(self, U: torch.Tensor | None, V: torch.Tensor | None) -> None:
        """Replace the columns by others that were found, rounded to what a file holds in 16 bits.

        They are rounded before anything is trained in them, so that an adapter is the same after loading.
        """
        self.fill(rounded(U), rounded(V))

    @torch.no_grad()
    def fill(self, U: torch.Tensor | None, V: torch.Tensor | None) -> None:
        """Replace the columns in place, so that every holder of the buffers sees them; None stands for the identity.

        Raises:
            ValueError: If a side is the identity in this basis but not in the arguments, or the reverse.
        """
        for name, columns in {"U": U, "V": V}.items():
            buffer = getattr(self, name)
            if (buffer is None) != (columns is None):
                raise ValueError(f"{name} is the identity on one side and has columns on the other")
            if buffer is not None:
                buffer.copy_(columns)


def _sides_in(dtype: torch.dtype, has_U: bool, has_V: bool, *sides: torch.Tensor) -> tuple[Side, Side]:
    U, V = (sides[0] if has_U else None), (sides[-1] if has_V else None)
    return side_in(U, dtype), side_in(V, dtype)
