"""The renewal of supports, by which they follow the gradient during training.

The first support is chosen from gradients before training, which soon change as the model learns. So after
`renewal_steps` optimizer steps, and whenever their number has doubled, the entries of the smallest values are replaced
by those whose gradient was largest in the steps before, as RigL (arXiv 1911.11134) does with whole networks. The
backward pass forms the gradient of the whole core anyway.
"""

from __future__ import annotations

import torch

from ..common.distributed import copy_from_main, sum_over_ranks
from ..functional import SUPPORT_SCORES, move_entries, renew_support
from .plan import LayerPlan

FRACTION = 0.3  # of the values that each renewal replaces


def next_renewal(steps: int, first: int) -> int:
    """Return the smallest of `first`, 2 `first`, 4 `first`, ... that is greater than `steps`."""
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
        indices: Sorted positions of the values in the core, shape (k,).
        gradient_sum: Sum of the core's gradient over this rank's backward passes, shape (r_out, r_in). It is summed
            over the ranks in place.

    Returns:
        Sorted positions, int64, shape (k,).

    Raises:
        ValueError: If the values are sharded, so that they cannot be moved.
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
    """Move an optimizer's state for `values` (k,) from the entries `old` to the entries `new`.

    In a state that is nowhere negative, such as Adam's second moment, a new entry begins with the mean; in any other,
    such as a momentum, it begins with zero. A state that is quantised in blocks cannot be moved and is reset.
    """
    state = optimizer.state.get(values, {})
    moving = {key: s for key, s in state.items() if isinstance(s, torch.Tensor) and s.shape == values.shape}
    if not all(entries.is_floating_point() for entries in moving.values()):
        optimizer.state.pop(values)
        return
    for entries in moving.values():
        fill = entries.mean().item() if bool((entries >= 0).all()) else 0.0
        entries.copy_(move_entries(entries, old, new, fill))
