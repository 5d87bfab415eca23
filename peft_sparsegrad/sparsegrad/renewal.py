"""Renewal: while an adapter trains, its supports follow the gradient.

The first support is chosen from the gradients before training, and what they ask for is soon learned. So after
`renewal_steps` optimizer steps, and whenever their number has doubled, the smallest values give up their entries to
those whose gradient was largest in the steps before, as in RigL (arXiv 1911.11134), which does so with whole networks.
The backward pass forms the gradient of the whole core anyway.
"""

from __future__ import annotations

import torch

from ..common.distributed import copy_from_main, sum_over_ranks
from ..functional import SUPPORT_SCORES, move_entries, renew_support
from .plan import LayerPlan

FRACTION = 0.3  # of the values, at each renewal


def next_renewal(steps: int, first: int) -> int:
    """Return the first of `first`, 2 `first`, 4 `first`, ... that is above `steps`."""
    renewal = first
    while renewal <= steps:
        renewal *= 2
    return renewal


def renewed_support(
    plan: LayerPlan, values: torch.Tensor, indices: torch.Tensor, gradient_sum: torch.Tensor
) -> torch.Tensor:
    """Choose the entries that train from now on, the same on every rank.

    Args:
        plan: The plan of the layer's adapter.
        values: Trained values, shape (k,).
        indices: Their sorted positions in the core, shape (k,).
        gradient_sum: Sum over this rank's backward passes, shape (r_out, r_in). Summed over the ranks in place.

    Returns:
        Sorted positions, int64, shape (k,).

    Raises:
        ValueError: If the values are sharded, and cannot be moved.
    """
    if values.shape != (plan.k,):
        raise ValueError(
            f"the support of {plan.name!r} cannot be renewed, because its values are sharded: set `renewal_steps=0`"
        )
    sum_over_ranks(gradient_sum)
    new = renew_support(indices, values, SUPPORT_SCORES[plan.support_score].of(gradient_sum), FRACTION)
    copy_from_main(new)
    return new


def move_state(optimizer: torch.optim.Optimizer, values: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
    """Let an optimizer's state for `values` (k,) follow them from the entries `old` to the entries `new`.

    A new entry begins with the mean of a state that is nowhere negative, a scale such as Adam's second moment, and
    with zero of any other, such as a momentum. State that is quantised in blocks cannot be moved and begins anew.
    """
    state = optimizer.state.get(values, {})
    moving = {key: s for key, s in state.items() if isinstance(s, torch.Tensor) and s.shape == values.shape}
    if not all(entries.is_floating_point() for entries in moving.values()):
        optimizer.state.pop(values)
        return
    for entries in moving.values():
        fill = entries.mean().item() if bool((entries >= 0).all()) else 0.0
        entries.copy_(move_entries(entries, old, new, fill))
