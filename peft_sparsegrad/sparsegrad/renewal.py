"""The renewal of supports, by which they follow the gradient during training.

The first support is chosen from gradients before training, which soon change as the model learns. So after
`renewal_steps` optimizer steps, and whenever their number has doubled, the entries of the smallest values are replaced
by those whose gradient was largest in the steps before, as RigL (arXiv 1911.11134) does with whole networks. The
backward pass forms the gradient of the whole core anyway.

A value that survives keeps its slot, and a new entry takes the slot of a dropped one. So every copy of the values by
position (moments, averages, slow weights) stays right for the survivors, whoever keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..common.distributed import copy_from_main, sum_over_ranks
from ..functional import renew_support
from .core_gradient import CoreGradient
from .plan import LayerPlan

FRACTION = 0.3  # of the values that each renewal replaces


def next_renewal(steps: int, first: int) -> int:
    """Return the smallest of `first`, 2 `first`, 4 `first`, ... that is greater than `steps`."""
    renewal = first
    while renewal <= steps:
        renewal *= 2
    return renewal


def is_sharded(values: torch.Tensor, k: int) -> bool:
    """Return whether a rank holds only some of the `k` values, so that they cannot be chosen by size."""
    return values.shape != (k,) or hasattr(values, "placements")  # a DTensor tells the shape of the whole


def renewed_support(
    plan: LayerPlan, values: torch.Tensor, indices: torch.Tensor, core_gradient: CoreGradient
) -> torch.Tensor:
    """Choose the entries that train from now on, the same on every rank.

    Args:
        plan: The plan of the layer's adapter.
        values: Trained values, shape (k,).
        indices: Positions of the values in the core, shape (k,).
        core_gradient: Gradient of the core. Its total is summed over the ranks in place.

    Returns:
        Positions, int64, shape (k,); see `renew_support`.
    """
    assert core_gradient.total is not None
    sum_over_ranks(core_gradient.total)
    new = renew_support(indices, values, core_gradient.score(), FRACTION)
    copy_from_main(new)
    return new


def reset_state(optimizer: torch.optim.Optimizer, values: torch.Tensor, renewed: torch.Tensor) -> None:
    """Reset an optimizer's state for the values whose slots have a new entry.

    In a state that is nowhere negative, such as Adam's second moment, a new entry begins with the mean of the others;
    in any other, such as a momentum or slow weights, it begins with zero. A state that is not one number for each
    value, such as one quantised in blocks, a matrix over the values, a history of gradients or an object, is dropped
    whole, and the optimizer begins it again.

    Args:
        optimizer: The optimizer.
        values: Trained values, shape (k,).
        renewed: Boolean mask of the slots with a new entry, shape (k,).
    """
    if isinstance(optimizer, torch.optim.LBFGS):  # its history is under the first parameter and covers all of them
        optimizer.state.clear()
        return
    state = list(_parts(optimizer.state.get(values, {}).values()))
    tensors = [each for each in state if isinstance(each, torch.Tensor) and each.numel() > 1]
    if not all(_is_by_value(tensor, len(values)) for tensor in tensors) or any(map(_is_unknown, state)):
        optimizer.state.pop(values)
        return
    for tensor in tensors:
        tensor[..., renewed] = tensor.mean() if bool((tensor >= 0).all()) else 0.0


def _is_by_value(tensor: torch.Tensor, k: int) -> bool:
    """Return whether a tensor (..., k) holds numbers for each of k values."""
    return tensor.is_floating_point() and tensor.shape[-1] == k and k not in tensor.shape[:-1]


def _is_unknown(part: Any) -> bool:
    """Return whether a part of an optimizer's state is an object that may hold anything."""
    return part is not None and not isinstance(part, torch.Tensor | int | float | str | torch.dtype)


def _parts(state: Iterable[Any]) -> Iterator[Any]:
    """Yield the parts of an optimizer's state of one parameter, also those in lists and dictionaries."""
    for each in state:
        if isinstance(each, dict):
            yield from _parts(each.values())
        elif isinstance(each, list | tuple):
            yield from _parts(each)
        else:
            yield each
