"""GradDrop's part in an optimizer's step: count the step, and hold masked entries where they are.

This makes masks advance and frozen entries stay in any training loop, without a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ..common.optimizer_watcher import OptimizerStep
from ..functional import GradientMask
from .mask_sampler import MaskSampler


class MaskedParameter(NamedTuple):
    """A trained parameter, with the sampler, the name and the block on which its mask depends."""

    parameter: torch.nn.Parameter
    sampler: MaskSampler
    name: str
    block: str


class _Held(NamedTuple):
    parameter: torch.nn.Parameter
    mask: GradientMask
    before: torch.Tensor


def before_masked_step(parameters: Iterable[MaskedParameter], step: OptimizerStep) -> Callable[[], None] | None:
    """Prepare masked parameters for a step: drop fully masked gradients, and remember entries to be held.

    Returns:
        A function to call after the step, which restores the entries and counts the step; None if the optimizer holds
        none of the parameters.

    Raises:
        RuntimeError: If the masks are bound to another run's optimizer, or entries are to be held from an optimizer
            that moves them outside of its steps.
    """
    updated = [masked for masked in parameters if step.updates(masked.parameter)]
    if not updated:
        return None
    held = [entries for masked in updated if (entries := _hold(masked, step)) is not None]

    def after_step() -> None:
        for parameter, mask, before in held:
            mask.restore_(parameter, before)
        for masked in updated:
            masked.sampler.step_taken()

    return after_step


def _hold(masked: MaskedParameter, step: OptimizerStep) -> _Held | None:
    parameter, sampler, name, block = masked
    sampler.check_optimizer(step.optimizer)
    if step.has_closure:
        sampler.begin_pass()  # the closure runs the passes of this step only now
    if sampler.config.frozen == "hold":
        _check_moves_in_steps(step.optimizer)
    if sampler.config.frozen != "hold" or (parameter.grad is None and not step.has_closure):
        return None
    mask = sampler.mask(name, block)
    if mask.keeps_nothing and not step.has_closure:
        parameter.grad = None  # optimizers skip parameters without a gradient
        return None
    return _Held(parameter, mask, parameter.detach().clone()) if mask.keeps_nothing or mask.chooses else None


def _check_moves_in_steps(optimizer: torch.optim.Optimizer) -> None:
    """Raise a RuntimeError if an optimizer swaps the weights for an average of theirs, as schedule-free ones do."""
    if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        raise RuntimeError(
            f"{type(optimizer).__name__} swaps the weights for an average, which moves entries that GradDrop is to "
            "hold: set frozen='gradient', or use another optimizer"
        )
