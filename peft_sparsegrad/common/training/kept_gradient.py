"""The gradient of earlier backward passes, where an engine keeps it elsewhere than in the parameter's `grad`.

FSDP2 computes with a whole parameter that lives for one pass, and adds its gradient to that of the sharded one;
DeepSpeed adds it to a buffer. Their objects are found on the call stack of the forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from .pieces import local_part

Keeper: TypeAlias = "Callable[[], bool]"


def keeper_of(parameter: torch.Tensor) -> Keeper | None:
    """Return a function that says whether there is a gradient of earlier passes; None if no engine keeps it.

    It has to be called in the forward pass.

    Args:
        parameter: The parameter as the forward pass sees it.
    """
    for owner in callers():
        if hasattr(owner, "_get_fsdp_state"):
            for sharded in _sharded_parameters(owner):
                if getattr(sharded, "_unsharded_param", None) is parameter:
                    return lambda sharded=sharded: _fsdp2_keeps_some(sharded)
        if type(owner).__name__ == "DeepSpeedEngine":
            return lambda engine=owner: engine.micro_steps % engine.gradient_accumulation_steps() > 0
    return None


def callers() -> Iterator[Any]:
    """Yield the objects whose methods are running, the innermost first."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            yield frame.f_locals.get("self")
        frame = frame.f_back


def _sharded_parameters(module: Any) -> list[Any]:
    """Return FSDP2's records of the parameters that it shards with a module."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one before torch 2.11
    return [sharded for group in groups if group is not None for sharded in group.fsdp_params]


def _fsdp2_keeps_some(sharded: Any) -> bool:
    if sharded.unsharded_accumulated_grad is not None:
        return True
    gradient = sharded.sharded_param.grad
    if gradient is None:
        return False
    local = local_part(gradient)
    return not local.numel() or bool(local.any())  # zero after `zero_grad(set_to_none=False)`
