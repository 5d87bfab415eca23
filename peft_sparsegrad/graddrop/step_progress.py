"""The progress of a training run, as masks need it: which optimizer step a pass belongs to, and whose steps count."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..common.training.backward import backward_id
from ..common.training.optimizer_watcher import innermost
from .outside_changes import OutsideChanges
from .step_count import StepCount


class StepProgress:
    """Progress of a run in optimizer steps, which are counted until `set_step` is called for the first time.

    From then on they are announced.

    Args:
        holds: True if masked entries are to be held where they are.

    Attributes:
        steps_taken: Count of the optimizer steps taken.
        is_shared: True if an adapter's checkpoint holds that count.
        step: Optimizer steps taken before the one whose passes are running.
    """

    def __init__(self, holds: bool) -> None:
        self._holds = holds
        self.steps_taken = StepCount({}, "")
        self.is_shared = False
        self.reset()

    def share(self, steps_taken: StepCount) -> None:
        """Count steps in a tensor that is saved with an adapter, from what that has counted so far."""
        self.steps_taken, self.is_shared = steps_taken, True

    def reset(self) -> None:
        """Forget everything about the run; the steps taken remain."""
        self.step = self.steps_taken.value
        self._counts_steps, self._backward = True, -1
        self._stepped: set[str] | None = None  # parameters that have had the step of the last pass; None before any
        self._changes = OutsideChanges(self._holds)
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_optimizer": None}  # bound to no run

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Bind the masks to the run of `optimizer`, so that `check_optimizer` rejects any other optimizer."""
        self._optimizer = weakref.ref(innermost(optimizer))

    def is_bound_to(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Return whether the masks are bound to the run of `optimizer`."""
        return self._optimizer is not None and self._optimizer() is innermost(optimizer)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise a RuntimeError if the masks are bound to another run, which was interrupted and left them behind."""
        if self._optimizer is not None and not self.is_bound_to(optimizer):
            raise RuntimeError(
                "the gradients of this step were masked for another run, with another optimizer, which was "
                "interrupted: call `remove()` of its `callback.graddrop`, or give this Trainer a `GradDropCallback`"
            )

    def set_step(self, step: int) -> None:
        """Announce an optimizer step, counted from 0; from now on every step has to be announced."""
        self.step, self._counts_steps = step, False

    def begin_pass(self) -> None:
        """Note that a forward pass begins; the first one after an optimizer step belongs to the next step.

        It is not to be called inside a backward pass, where an optimizer may step as soon as a gradient is there: the
        forward passes that checkpointing computes again belong to the step that the backward pass is in.
        """
        self._stepped = set()
        if self._counts_steps:
            self.step = self.steps_taken.value

    def begin_backward(self) -> None:
        """Note that a gradient arrives; the first one of a backward pass after a step belongs to the next step."""
        if backward_id() != self._backward:
            self._backward = backward_id()
            self.begin_pass()

    def awaits_step(self, name: str) -> bool:
        """Return whether there was a pass since the last step of a parameter.

        torch's distributed checkpoints take a step without one, with gradients of zero, to make an optimizer's state.
        """
        return self._stepped is not None and name not in self._stepped

    def step_begins(self, name: str, parameter: torch.Tensor) -> None:
        """Note that an optimizer is about to move a parameter, and check what its last step has left."""
        self._changes.step_begins(name, parameter)

    def step_taken(self, name: str, parameter: torch.Tensor) -> None:
        """Note that an optimizer has taken a step with a parameter; the passes that follow belong to another step."""
        if self._stepped is not None:
            self._stepped.add(name)
        self.steps_taken.value = self.step + 1
        self._changes.step_taken(name, parameter)

    def values_replaced(self) -> None:
        """Note that parameters have been loaded, which is no step."""
        self._changes.forget()

    def check_steps_are_seen(self, name: str, parameter: torch.Tensor) -> None:
        """Raise a RuntimeError if `parameter` has changed outside of steps, which are counted or hold entries."""
        self._changes.check(name, parameter, self._counts_steps)
