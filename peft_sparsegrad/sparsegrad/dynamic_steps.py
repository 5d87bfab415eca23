"""The steps of a dynamic support: the entries of the largest gradient move, and no others.

The entries are chosen before the step, when the gradients of all ranks and micro-batches have been added up. The paper
trains with a masked Adam. A plain Adam goes on moving entries by their momentum after their gradient has become zero,
so that far more than the chosen entries change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..common.training.optimizer_watcher import OptimizerStep
from ..common.training.pieces import Piece
from ..functional import keep_largest
from .plan import LayerPlan

_STEPS = 3  # that are watched; the first of Adam does not show it, as there is no momentum yet


class DynamicSteps:
    """Chooser of the entries that move in each step, and watch over the first steps of a run.

    Args:
        plan: The plan of the layer's adapter.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self._plan, self._steps_left = plan, _STEPS

    @torch.no_grad()
    def before_step(self, step: OptimizerStep, piece: Piece, device: torch.device) -> Callable[[], None] | None:
        """Set the gradient of the entries to zero that are not to move, and return a function to call after the step.

        Args:
            step: The step.
            piece: Piece of the values of the whole core.
            device: Device of the layer, where collective operations are possible.

        Raises:
            RuntimeError: If the step computes several gradients.
        """
        if step.repeats_passes:
            raise RuntimeError(
                f"`support='dynamic'` chooses entries by the gradient of a step, and {type(step.optimizer).__name__} "
                "computes several in one: use `create_sparsegrad_optimizer(model, lr)`, or support='static'"
            )
        gradient = piece.gradient
        if gradient is None:
            return None
        gradient.copy_(piece.cut(keep_largest(piece.joined(gradient, device), self._plan.k)))
        if not self._steps_left:
            return None
        rests = gradient == 0
        return partial(self._check, piece, rests, piece.values[rests])

    def _check(self, piece: Piece, rests: torch.Tensor, before: torch.Tensor) -> None:
        self._steps_left -= 1
        if not torch.equal(piece.values[rests], before):
            raise RuntimeError(
                f"the optimizer has moved values of {self._plan.name!r} whose gradient is zero, and with "
                "support='dynamic' only the entries chosen in the step may move: use "
                "`create_sparsegrad_optimizer(model, lr)`, with a Trainer as `optimizers=(optimizer, None)`, or "
                "support='static'"
            )
