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

from ..common.training.distributed import copy_from_main
from ..common.training.pieces import Piece
from ..functional import renew_support

FRACTION = 0.3  # of the values that each renewal replaces


def next_renewal(steps: int, first: int) -> int:
    """Return the smallest of `first`, 2 `first`, 4 `first`, ... that is greater than `steps`."""
    renewal = first
    while renewal <= steps:
        renewal *= 2
    return renewal


def renewed_support(
    values: torch.Tensor, indices: torch.Tensor, score: torch.Tensor | None, num_experts: int = 1
) -> torch.Tensor:
    """Choose the entries that train from now on, the same on every rank.

    Each expert keeps its number of values, and one whose gradient was zero keeps its entries.

    Args:
        values: Trained values, shape (k,), those of one expert after those of another.
        indices: Positions of the values in the core, shape (k,).
        score: Score of each entry of the core, shape (r_out, r_in); None if its gradient was zero.
        num_experts: Number of experts whose cores lie one below the other.

    Returns:
        Positions, int64, shape (k,); see `renew_support`.
    """
    new = indices.clone()
    if score is not None:
        scores, size = score.view(num_experts, -1), score.numel() // num_experts
        parts = zip(scores, new.view(num_experts, -1), values.view(num_experts, -1), strict=True)
        for expert, (own_score, own, own_values) in enumerate(parts):
            if own_score.any():
                start = expert * size
                own.copy_(renew_support(own - start, own_values, own_score, FRACTION) + start)
    copy_from_main(new)
    return new


def reset_state(optimizer: torch.optim.Optimizer, piece: Piece, renewed: torch.Tensor) -> None:
    """Reset an optimizer's state for the values whose slots have a new entry.

    In a state that is nowhere negative, such as Adam's second moment, a new entry begins with the mean of the others;
    in any other, such as a momentum or slow weights, it begins with zero. A state that is not one number for each
    value, such as one quantised in blocks, a matrix over the values, a history of gradients or an object, is dropped
    whole, and the optimizer begins it again.

    Args:
        optimizer: The optimizer.
        piece: Piece of the trained values that the optimizer holds.
        renewed: Boolean mask of the slots with a new entry, shape (k,).

    Raises:
        RuntimeError: If a state that would have to be dropped is also that of other parameters or ranks.
    """
    if isinstance(optimizer, torch.optim.LBFGS):  # its history is under the first parameter and covers all of them
        optimizer.state.clear()
        return
    state = list(_parts(optimizer.state.get(piece.held, {}).values()))
    tensors = [each for each in state if isinstance(each, torch.Tensor) and each.numel() > 1]
    if not all(_is_by_value(tensor, piece) for tensor in tensors) or any(map(_is_unknown, state)):
        _drop_state(optimizer, piece)
        return
    for tensor in tensors:
        if piece.is_whole:
            tensor[..., renewed] = _first_state(tensor)
        else:
            part = piece.of(tensor)
            part.masked_fill_(piece.cut(renewed), _first_state(piece.joined(part, renewed.device)))


def _first_state(tensor: torch.Tensor) -> float | torch.Tensor:
    """Return the state of a new entry by that of all entries (..., k)."""
    return tensor.mean() if bool((tensor >= 0).all()) else 0.0


def _drop_state(optimizer: torch.optim.Optimizer, piece: Piece) -> None:
    if not piece.is_whole:
        raise RuntimeError(
            f"the state of {type(optimizer).__name__} is not one number for each value, and is split over the ranks, "
            "so that it cannot follow a renewal of the support: take AdamW, or set `renewal_steps=0`"
        )
    optimizer.state.pop(piece.held)


def _is_by_value(tensor: torch.Tensor, piece: Piece) -> bool:
    """Return whether a tensor (..., k) holds numbers for each value that the optimizer holds with the piece."""
    if not piece.is_whole:
        return tensor.is_floating_point() and tensor.shape == piece.held.shape
    k = piece.size
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
