"""The checks that a parameter is changed by an optimizer that holds it, not through a copy and not after its step.

Master weights, offloaded optimizers and hand-written updates step on copies or without any optimizer, and write the
result back. Nothing announces such a step, and state that is kept for a copy cannot be moved or held. A wrapper that
calls no hooks of torch lets another optimizer step, and may overwrite what that has written.
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
        now, before = _sample(parameter), self._before
        self._before = now
        return before is not None and _differ(before, now)


class LeftByStep:
    """A parameter as an optimizer's step has left it, which wrappers with slow weights overwrite after the step.

    Every write in place raises the version of a tensor, so values are compared only after one. Weights that were
    swapped for their average and back are the same again.
    """

    @torch.no_grad()
    def __init__(self, parameter: torch.Tensor) -> None:
        self._version, self._values = parameter._version, _sample(parameter)

    @torch.no_grad()
    def is_overwritten(self, parameter: torch.Tensor) -> bool:
        """Return whether the parameter has other values now."""
        return parameter._version != self._version and _differ(self._values, _sample(parameter))


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    flat = local_part(parameter.detach()).flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()


def _differ(before: torch.Tensor, now: torch.Tensor) -> bool:
    return before.shape == now.shape and not torch.equal(before.to(now), now)
