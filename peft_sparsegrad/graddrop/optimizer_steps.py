"""What has to happen around an optimizer's step: steps are counted, and what is masked is held where it is.

PEFT never shows a tuner the optimizer, but torch lets one watch every optimizer's steps. So masks advance, and frozen
entries stay, in any training loop and without a callback.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..functional import GradientMask
from .gradient_masks import GradientMasks


class MaskedParameter(NamedTuple):
    """A trained tensor, and what its mask depends on."""

    parameter: torch.nn.Parameter
    masks: GradientMasks
    name: str
    layer: str


class Owner(Protocol):
    """Whatever has masked parameters: an adapted layer, or a [`GradDrop`]."""

    def masked_parameters(self) -> Iterable[MaskedParameter]: ...


class _Held(NamedTuple):
    parameter: torch.nn.Parameter
    mask: GradientMask
    before: torch.Tensor


_OWNERS: weakref.WeakSet[Any] = weakref.WeakSet()
_HELD: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[_Held]] = weakref.WeakKeyDictionary()


def watch(owner: Owner) -> None:
    """From now on look after the parameters of `owner` in every optimizer's steps, for as long as it lives."""
    _register_hooks()
    _OWNERS.add(owner)


def forget(owner: Owner) -> None:
    """Undo `watch`."""
    _OWNERS.discard(owner)


def owners() -> list[Any]:
    """Everything that is watched."""
    return list(_OWNERS)


@functools.cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)  # args begin with the optimizer
    held = []
    for parameter, masks, name, layer in _parameters_of(optimizer):
        masks.check_optimizer(optimizer)
        if closure is not None:
            masks.begin_pass()  # its passes are yet to come
        if masks.config.frozen != "hold" or (parameter.grad is None and closure is None):
            continue
        mask = masks.mask(name, layer)
        if mask.keeps_nothing and closure is None:
            parameter.grad = None  # optimizers pass over it
        elif mask.keeps_nothing or mask.chooses:
            held.append(_Held(parameter, mask, parameter.detach().clone()))
    _HELD[optimizer] = held


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, mask, before in _HELD.pop(optimizer, []):
        mask.restore_(parameter, before)
    for masked in _parameters_of(optimizer):
        masked.masks.step_taken()


def _parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[MaskedParameter]:
    if not _OWNERS:
        return
    ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for owner in owners():
        for masked in owner.masked_parameters():
            if id(masked.parameter) in ours:
                yield masked
