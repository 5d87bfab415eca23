"""The check that an optimizer of a dynamic support moves only the entries with a gradient.

The paper trains with a masked Adam. A plain Adam goes on moving entries by their momentum after their gradient has
become zero, so that far more than the chosen entries change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..common.pieces import Piece

_STEPS = 3  # the first of Adam does not show it, as there is no momentum yet


class MaskedMoves:
    """Watch over the first steps that a run takes with the values of one dynamic support."""

    def __init__(self) -> None:
        self._steps_left = _STEPS

    def before_step(self, name: str, piece: Piece, gradient: torch.Tensor) -> Callable[[], None] | None:
        """Return a function to call after the step; None once the first steps are over.

        Args:
            name: Name of the layer.
            piece: Piece of the values of the whole core, shape (length,).
            gradient: Gradient of the piece, shape (length,).
        """
        if not self._steps_left:
            return None
        rests = gradient == 0
        return partial(self._check, name, piece, rests, piece.values[rests])

    def _check(self, name: str, piece: Piece, rests: torch.Tensor, before: torch.Tensor) -> None:
        self._steps_left -= 1
        if not torch.equal(piece.values[rests], before):
            raise RuntimeError(
                f"the optimizer has moved values of {name!r} whose gradient is zero, and with support='dynamic' only "
                "the entries chosen in the step may move: use `create_sparsegrad_optimizer(model, lr)`, with a "
                "Trainer as `optimizers=(optimizer, None)`, or support='static'"
            )
