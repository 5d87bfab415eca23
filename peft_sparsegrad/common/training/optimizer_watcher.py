"""The watcher that calls adapters before and after the steps of optimizers.

PEFT gives a tuner no access to the optimizer, but torch calls global hooks around every optimizer's step. With these
hooks, masks advance and supports are renewed in any training loop, without a call from the loop.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .pieces import Piece, piece_of
from .zero import pieces_of_step


class OptimizerStep:
    """A step that an optimizer is about to take.

    Attributes:
        optimizer: The optimizer that torch runs, also where DeepSpeed calls it.
        has_closure: True if the step runs its own forward and backward passes, so that gradients are still to come.
        optimizers: The optimizer, and those that have stepped inside its step, as a Lookahead lets another do.
        renewed: By the `id` of a parameter, boolean mask of the slots that a renewal has set to zero after the step.
    """

    def __init__(self, optimizer: Optimizer, has_closure: bool, outer: list[OptimizerStep]) -> None:
        self.optimizer, self.has_closure = optimizer, has_closure
        self.optimizers = [optimizer]
        self.renewed: dict[int, torch.Tensor] = {}
        self._outer = outer
        self._parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._pieces = pieces_of_step(optimizer)
        for step in outer:
            step.optimizers.append(optimizer)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Return whether the optimizer holds this parameter, or a piece of it, on any rank."""
        return id(parameter) in self._parameters or id(parameter) in self._pieces

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Return the piece of a parameter that the optimizer holds on this rank."""
        return self._pieces.get(id(parameter)) or piece_of(parameter)

    def updates(self, parameter: nn.Parameter) -> bool:
        """Return whether the optimizer holds this parameter, and is the outermost of those in a step that do."""
        return self.holds(parameter) and not any(step.holds(parameter) for step in self._outer)


class StepObserver(Protocol):
    """An object that acts before and after the steps of any optimizer that holds its parameters."""

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Prepare for a step, and return a function to call after it, or None if the step does not concern it."""
        ...


# Dictionaries keep their order, and every rank must take part in the same collective operation at the same time.
_OBSERVERS: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
# On the optimizer itself, so that a step that raises an error leaves nothing behind that outlives the optimizer.
_RUNNING = "_peft_sparsegrad_step"
# Code of the function that torch wraps around the step of every optimizer class.
_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__


def watch(observer: StepObserver) -> None:
    """Call `observer` before and after every optimizer's steps from now on, for as long as the observer lives."""
    _register_hooks()
    _OBSERVERS[observer] = None


def forget(observer: StepObserver) -> None:
    """Undo `watch`."""
    _OBSERVERS.pop(observer, None)


def observers() -> list[Any]:
    """Return every object that `watch` has registered, the earliest first."""
    return list(_OBSERVERS)


@functools.cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _OBSERVERS:
        return
    stepping = _stepping()
    if optimizer in stepping[1:]:  # a part of its own step, as in a class with `super().step()`
        return
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)  # args begin with the optimizer
    outer = [vars(each)[_RUNNING][0] for each in stepping[1:] if _RUNNING in vars(each)]
    step = OptimizerStep(optimizer, closure is not None, outer)
    calls = [observer.before_step(step) for observer in observers()]
    vars(optimizer)[_RUNNING] = step, [call for call in calls if call is not None]


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _RUNNING in vars(optimizer) and optimizer not in _stepping()[1:]:
        for call in vars(optimizer).pop(_RUNNING)[1]:
            call()


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside wrappers such as accelerate's or a Lookahead; `optimizer` if it is not wrapped."""
    return innermost(optimizer.optimizer) if hasattr(optimizer, "optimizer") else optimizer


def _stepping() -> list[Optimizer]:
    """Return the optimizers whose steps are running, the innermost first.

    torch wraps the step of every class, so its hooks run for a step inside another as well. The call stack tells them
    apart. A count of the steps that have begun would not, because a step that raises an error never ends.
    """
    frame, found = sys._getframe(), []
    while frame is not None:
        if frame.f_code is _WRAPPER:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found
