"""The part of the training state that travels with the optimizer's state dict.

An optimizer's state is by the slots of the values, and the adapter's file has no slots. The sum from which the next
renewal chooses a support is many times as large as the adapter. Both belong to a run that goes on, and whoever resumes
a run restores its optimizer: so they are in `optimizer.state_dict()`, under a key of the parameter groups, which every
loader of optimizer states keeps.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol, TypeAlias

import torch
from torch.optim import Optimizer

from ..common.training.pieces import Piece, local_part

KEY = "sparsegrad"


class Carried(Protocol):
    """A holder of training state for one parameter."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers that the optimizer's state dict is to carry."""
        ...


# Holders by the tensor that the optimizer holds, by its `id`, and the name of the layer.
_Holders: TypeAlias = "weakref.WeakValueDictionary[tuple[int, str], Carried]"
_CARRIED: weakref.WeakKeyDictionary[Optimizer, _Holders] = weakref.WeakKeyDictionary()


def carry(optimizer: Optimizer, held: torch.Tensor, name: str, holder: Carried) -> None:
    """Let the state dicts of an optimizer carry the state of a layer, for as long as both live.

    Args:
        optimizer: The optimizer.
        held: Tensor of the optimizer in which the values of the layer are, see `Piece`.
        name: Name of the layer.
        holder: Holder of the state.
    """
    if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        return  # a wrapper that makes its state dict of that of the optimizer inside
    if optimizer not in _CARRIED:
        _CARRIED[optimizer] = weakref.WeakValueDictionary()
        optimizer.register_state_dict_post_hook(_add_carried)
    _CARRIED[optimizer][id(held), name] = holder


def take(optimizer: Optimizer, held: torch.Tensor, name: str) -> dict[str, Any] | None:
    """Return the state that a loaded state dict has carried for a layer, and remove it; None if there is none."""
    for group in optimizer.param_groups:
        if KEY in group:
            positions = [position for position, each in enumerate(group["params"]) if each is held]
            found = [group[KEY].pop(f"{position} {name}", None) for position in positions]
            if not group[KEY]:
                del group[KEY]
            if found:
                return found[0]
    return None


def has_state(optimizer: Optimizer, piece: Piece) -> bool:
    """Return whether an optimizer has learned something by the slots of the values, a momentum for instance."""
    state = optimizer.state.get(piece.held, {}).values()
    tensors = [local_part(each) for each in state if isinstance(each, torch.Tensor)]
    return any(each.numel() > 1 and bool((each != each.flatten()[0]).any()) for each in tensors)


def _add_carried(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        positions = {id(held): position for position, held in enumerate(group["params"])}
        for (held, name), holder in _CARRIED[optimizer].items():
            if held in positions:
                # A new dictionary: torch's saved group shares those of the optimizer's own.
                saved[KEY] = {**saved.get(KEY, {}), f"{positions[held]} {name}": holder.state_dict()}
