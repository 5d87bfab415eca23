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
        repeats_passes: True if the step moves weights between several passes, as those of LBFGS and SAM do.
        optimizers: The optimizer, and those that have stepped inside its step, as a Lookahead lets another do.
        renewed: By the `id` of a parameter, boolean mask of the slots that a renewal has set to zero after the step.
    """

    def __init__(self, optimizer: Optimizer, outer: list[OptimizerStep]) -> None:
        self.optimizer, self.repeats_passes = optimizer, isinstance(optimizer, torch.optim.LBFGS)
        self.optimizers = [optimizer]
        self.renewed: dict[int, torch.Tensor] = {}
        self._outer = outer
        self._parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._pieces = pieces_of_step(optimizer)
        for step in outer:
            step.optimizers.append(optimizer)

    def holds(self, parameter: torch.Tensor) -> bool:
        """Return whether the optimizer holds this parameter, or a piece of it, on any rank."""
        return id(parameter) in self._parameters or id(parameter) in self._pieces

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Return the piece of a parameter that the optimizer holds on this rank."""
        return self._pieces.get(id(parameter)) or piece_of(parameter)

    def writes(self) -> list[int]:
        """Return the number of writes in place to each of the optimizer's parameters."""
        return [parameter._version for group in self.optimizer.param_groups for parameter in group["params"]]

    def updates(self, parameter: nn.Parameter) -> bool:
        """Return whether the optimizer holds this parameter, and is the outermost of those in a step that do."""
        return self.holds(parameter) and not any(step.holds(parameter) for step in self._outer)


class StepObserver(Protocol):
    """An object that acts before and after the steps of any optimizer that holds its parameters."""

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Prepare for a step whose gradients are there.

        Returns:
            A function to call after the step, or None if the step does not concern the observer.
        """
        ...


class _RunningStep:
    """A step that is running, which is prepared once and ended once.

    Args:
        step: The step.
    """

    def __init__(self, step: OptimizerStep) -> None:
        self.step = step
        self._is_prepared = False
        self._calls: list[Callable[[], None]] = []

    def prepare(self) -> None:
        """Let every observer prepare for the step, the first time that this is called."""
        if not self._is_prepared:
            self._is_prepared = True
            calls = [observer.before_step(self.step) for observer in observers()]
            self._calls = [call for call in calls if call is not None]

    def preparing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that also prepares for the step, once the gradients of its passes are there."""
        writes = self.step.writes()

        def pass_and_prepare() -> Any:
            self.step.repeats_passes |= self.step.writes() != writes
            _IN_CLOSURE.append(self.step)
            try:
                loss = closure()
            finally:
                _IN_CLOSURE.remove(self.step)
            self.prepare()
            return loss

        return pass_and_prepare

    def end(self) -> None:
        """Call what the observers want to be called after the step.

        Raises:
            RuntimeError: If the optimizer holds parameters of theirs and has not called its closure.
        """
        if not self._is_prepared:
            self.prepare()
            if self._calls:
                raise RuntimeError(
                    f"{type(self.step.optimizer).__name__} was given a closure and has taken a step without calling "
                    "it, so that the adapter could not prepare for it: call `step()` without, after `loss.backward()`"
                )
        for call in self._calls:
            call()


# Dictionaries keep their order, and every rank must take part in the same collective operation at the same time.
_OBSERVERS: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
# Steps whose closures are running. Not by the call stack, as a backward pass on a GPU is in a thread of its own.
_IN_CLOSURE: list[OptimizerStep] = []
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


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Prepare for a step, or return its arguments with a closure that does so once it has made the gradients."""
    if not _OBSERVERS:
        return None
    stepping = _stepping()
    if optimizer in stepping[1:]:  # a part of its own step, as in a class with `super().step()`
        return None
    outer = [vars(each)[_RUNNING].step for each in stepping[1:] if _RUNNING in vars(each)]
    running = vars(optimizer)[_RUNNING] = _RunningStep(OptimizerStep(optimizer, outer))
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": running.preparing(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):  # after the optimizer itself
        return (args[0], running.preparing(args[1]), *args[2:]), kwargs
    running.prepare()
    return None


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _RUNNING in vars(optimizer) and optimizer not in _stepping()[1:]:
        vars(optimizer).pop(_RUNNING).end()


def is_stepping(parameter: torch.Tensor) -> bool:
    """Return whether passes run inside a step of an optimizer that holds a parameter, and may move it between them."""
    return any(step.holds(parameter) for step in _IN_CLOSURE)


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
