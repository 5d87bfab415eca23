"""The watch for changes of masked parameters that no step of an optimizer has made, so that no mask governs them."""

from __future__ import annotations

from typing import Any

import torch

from ..common.training.optimizer_watcher import is_stepping
from ..common.training.unseen_steps import LeftByStep, UnseenSteps

_ADVICE = "give the optimizer the model's own parameters"


class OutsideChanges:
    """Watch over the parameters of one configuration, by name.

    Args:
        holds: True if masked entries are to be held where they are.
    """

    def __init__(self, holds: bool) -> None:
        self._holds, self._sees_steps = holds, False
        self._unseen: dict[str, UnseenSteps] = {}
        self._left: dict[str, LeftByStep] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_unseen": {}, "_left": {}}  # bound to no run

    def forget(self) -> None:
        """Forget all values, because others have been loaded."""
        self._unseen.clear()
        self._left.clear()

    def step_begins(self, name: str, parameter: torch.Tensor) -> None:
        """Note that an optimizer is about to move a parameter, after the check of what its last step has left."""
        self._check_is_as_left(name, parameter)
        self._left.pop(name, None)

    def step_taken(self, name: str, parameter: torch.Tensor) -> None:
        """Note that an optimizer has moved a parameter by the masks."""
        self._sees_steps = True
        self._unseen.clear()
        if self._holds:
            self._left[name] = LeftByStep(parameter)

    def check(self, name: str, parameter: torch.Tensor, counts_steps: bool) -> None:
        """Check that a parameter has not changed outside of steps since the last pass or step.

        Raises:
            RuntimeError: If it has, and steps are counted, as `counts_steps` says, or masked entries are held.
        """
        self._check_is_as_left(name, parameter)
        if self._sees_steps or is_stepping(parameter):
            return
        if not self._unseen.setdefault(name, UnseenSteps()).found(parameter):
            return
        if counts_steps:
            raise RuntimeError(
                f"{name!r} has changed without a step of an optimizer that holds it, so GradDrop cannot count the "
                f"steps: {_ADVICE}, give the Trainer a `GradDropCallback`, or call `set_step(step)` of a "
                "`GradDrop(model)` before each step"
            )
        if self._holds:
            raise RuntimeError(
                f"{name!r} has changed without a step of an optimizer that holds it, so GradDrop cannot hold masked "
                f"entries: {_ADVICE}, or set frozen='gradient'"
            )
        self._sees_steps = True  # announced, and nothing is held

    def _check_is_as_left(self, name: str, parameter: torch.Tensor) -> None:
        if name in self._left and self._left[name].is_overwritten(parameter):
            raise RuntimeError(
                f"{name!r} has changed after the step of an optimizer that holds it, as by the slow weights of a "
                "wrapper without torch's step hooks, so GradDrop cannot hold masked entries: use a wrapper that has "
                "them, or set frozen='gradient'"
            )
