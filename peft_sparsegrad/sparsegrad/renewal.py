"""Growing back: while an adapter trains, its supports follow the gradient.

The first support is chosen from the gradients before training, and what they ask for is soon learned. So after
`regrow_steps` optimizer steps, and whenever their number has doubled, the smallest values give up their entries to
those whose gradient was largest in the steps before, as in RigL (arXiv 1911.11134), which does so with whole networks.
The backward pass forms the gradient of the whole core anyway.

PEFT shows a tuner no optimizer, but torch lets one watch the steps of every optimizer: no training loop has to call
anything, and the optimizer's own state moves with the values.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..common.distributed import copy_from_main, sum_over_ranks
from ..functional import move_entries, renew_support

if TYPE_CHECKING:
    from .layer import SparseGradLayer
    from .state import Support

FRACTION = 0.3  # of the values, at each renewal

# A dictionary for its order: every rank must take the same layer's sum at the same time.
_LAYERS: weakref.WeakKeyDictionary[SparseGradLayer, None] = weakref.WeakKeyDictionary()
# The gradient, and its version, of the step that was counted last: torch's hook runs twice where an optimizer's step
# calls that of its base class.
_COUNTED: weakref.WeakKeyDictionary[Support, tuple[weakref.ref[torch.Tensor], int]] = weakref.WeakKeyDictionary()


def watch(layer: SparseGradLayer) -> None:
    """From now on count the steps of the values' optimizer, and renew supports, for as long as the layer lives."""
    _register_hook()
    _LAYERS[layer] = None


@torch.no_grad()
def step_taken(layer: SparseGradLayer, adapter_name: str, optimizer: torch.optim.Optimizer) -> None:
    """Count a step of an adapter's optimizer, and renew the support where its time has come.

    Raises:
        ValueError: If the values are sharded, and cannot be moved.
    """
    plan, values, support, _ = layer.adapter(adapter_name)
    if support.core_sum is None or values.grad is None or not support.is_settled:
        return  # optimizers leave values without a gradient alone, those of a frozen adapter for instance
    counted, version = _COUNTED.get(support, (None, 0))
    if counted is not None and counted() is values.grad and version == values.grad._version:
        return
    _COUNTED[support] = (weakref.ref(values.grad), values.grad._version)
    support.steps += 1
    if support.steps != next_renewal(support.steps - 1, plan.regrow_steps):
        return
    if values.shape != (plan.k,):
        raise ValueError(
            f"the support of {plan.name!r} cannot be renewed, because its values are sharded: set `regrow_steps=0`"
        )
    sum_over_ranks(support.core_sum)
    old = support.indices
    assert old is not None, "a dynamic support has no entries to renew"
    new = renew_support(old, values, support.core_sum.abs(), FRACTION)
    copy_from_main(new)
    move_state(optimizer, values, old, new)
    values.copy_(move_entries(values, old, new))
    support.settle(new)
    support.core_sum.zero_()


def next_renewal(steps: int, first: int) -> int:
    """The first of `first`, 2 `first`, 4 `first`, ... that is above `steps`."""
    renewal = first
    while renewal <= steps:
        renewal *= 2
    return renewal


def move_state(optimizer: torch.optim.Optimizer, values: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
    """Let an optimizer's state for `values` (k,) follow them from the entries `old` to the entries `new`.

    A new entry begins with the mean of what is nowhere negative, a scale such as Adam's second moment, and with zero
    of everything else, such as a momentum. State that is quantised in blocks cannot be moved and begins anew.
    """
    state = optimizer.state.get(values, {})
    moving = {key: s for key, s in state.items() if isinstance(s, torch.Tensor) and s.shape == values.shape}
    if not all(entries.is_floating_point() for entries in moving.values()):
        optimizer.state.pop(values)
        return
    for entries in moving.values():
        fill = entries.mean().item() if bool((entries >= 0).all()) else 0.0
        entries.copy_(move_entries(entries, old, new, fill))


@functools.cache
def _register_hook() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _LAYERS:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(_LAYERS):
        for name, values in layer.sparsegrad_values.items():
            if id(values) in trained:
                step_taken(layer, name, optimizer)
