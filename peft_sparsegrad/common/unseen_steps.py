"""The check that a parameter is changed by an optimizer that holds it, and not through a copy.

Master weights, offloaded optimizers and hand-written updates step on copies or without any optimizer, and write the
result back. Nothing announces such a step, and state that is kept for a copy cannot be moved or held.
"""

from __future__ import annotations

import torch

from .pieces import local_part

_SAMPLE = 4096  # entries of a parameter that are compared


class UnseenSteps:
    """Watch over one parameter until the first step of an optimizer that holds it.

    Attributes:
        is_over: True after that step.
    """

    def __init__(self) -> None:
        self._before: torch.Tensor | None = None
        self.is_over = False

    def step_seen(self) -> None:
        """Note that an optimizer that holds the parameter has taken a step, after which nothing is compared."""
        self._before, self.is_over = None, True

    @torch.no_grad()
    def found(self, parameter: torch.Tensor) -> bool:
        """Return whether the parameter has changed since the last training pass, though no step was seen."""
        if self.is_over:
            return False
        flat = local_part(parameter.detach()).flatten()
        now, before = flat[:: max(1, flat.numel() // _SAMPLE)].clone(), self._before
        self._before = now
        return before is not None and before.shape == now.shape and not torch.equal(before.to(now), now)
