"""The part of the training state that travels with the optimizer's state dict.

An optimizer's state is by the slots of the values, and the adapter's file has no slots. The sum from which the next
renewal chooses a support is many times as large as the adapter. Both belong to a run that goes on, and whoever resumes
a run restores its optimizer: so they are in `optimizer.state_dict()`, under a key of the parameter groups, which every
loader of optimizer states keeps.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

KEY = "sparsegrad"


class Carried(Protocol):
    """A holder of training state for one parameter."""

    @property
    def values(self) -> nn.Parameter:
        """The parameter."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers that the optimizer's state dict is to carry."""
        ...


_CARRIED: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Carried]] = weakref.WeakKeyDictionary()


def carry(optimizer: Optimizer, holder: Carried) -> None:
    """Let the state dicts of an optimizer carry the state of `holder`, for as long as both live."""
    if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        return  # a wrapper that makes its state dict of that of the optimizer inside
    if optimizer not in _CARRIED:
        _CARRIED[optimizer] = weakref.WeakSet()
        optimizer.register_state_dict_post_hook(_add_carried)
    _CARRIED[optimizer].add(holder)


def take(optimizer: Optimizer, values: nn.Parameter) -> dict[str, Any] | None:
    """Return the state that a loaded state dict has carried for a parameter, and remove it; None if there is none."""
    for group in optimizer.param_groups:
        if KEY in group:
            positions = [str(position) for position, each in enumerate(group["params"]) if each is values]
            found = [group[KEY].pop(position, None) for position in positions]
            if not group[KEY]:
                del group[KEY]
            if found:
                return found[0]
    return None


def has_state(optimizer: Optimizer, values: nn.Parameter) -> bool:
    """Return whether an optimizer has learned something by the slots of the values, a momentum for instance."""
    tensors = [each for each in optimizer.state.get(values, {}).values() if isinstance(each, torch.Tensor)]
    return any(each.numel() > 1 and bool((each != each.flatten()[0]).any()) for each in tensors)


def _add_carried(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    holders = {id(holder.values): holder for holder in _CARRIED[optimizer]}
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) in holders:
                saved.setdefault(KEY, {})[str(position)] = holders[id(parameter)].state_dict()
