"""DeepSpeed ZeRO, whose optimizers step with flat tensors in place of the model's parameters.

DeepSpeed calls torch's optimizer with the rank's partition of a flat tensor, in which it has laid out the parameters
one after the other. Its own optimizer around that knows the layout, and is found on the call stack, as torch has no
hook that names it. Nothing here is imported unless the program has imported DeepSpeed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .kept_gradient import callers
from .pieces import Piece, piece_of


def is_managed(parameter: torch.Tensor) -> bool:
    """Return whether DeepSpeed ZeRO has taken over a parameter and its gradient."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def pieces_of_step(optimizer: torch.optim.Optimizer) -> dict[int, Piece]:
    """Return the piece of every parameter, by `id`, that DeepSpeed updates by the step of `optimizer` that is running.

    Empty outside of DeepSpeed.
    """
    if "deepspeed" not in sys.modules:
        return {}
    zero = next((owner for owner in callers() if _is_zero_optimizer_around(optimizer, owner)), None)
    if zero is None:
        return {}
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    pieces = _by_partition(zero) if hasattr(zero, "fp16_groups") else _by_fragment(zero)
    return {id(parameter): piece for parameter, piece in pieces if id(piece.held) in held}


def _is_zero_optimizer_around(optimizer: torch.optim.Optimizer, owner: Any) -> bool:
    is_zero = any(each.__name__ == "ZeROOptimizer" for each in type(owner).__mro__)
    return is_zero and owner.optimizer is optimizer


def _by_fragment(zero: Any) -> Iterator[tuple[nn.Parameter, Piece]]:
    """Yield the pieces of ZeRO-1 and ZeRO-2, and of their bf16 variant."""
    groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            size, ranks, mapping = parameter.numel(), parameter._dp_group, parameter._hp_mapping
            if mapping is None:
                yield parameter, Piece(flat, size, 0, 0, 0, ranks)
            else:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield parameter, Piece(flat, size, here.start, here.numel, there.start, ranks)


def _by_partition(zero: Any) -> Iterator[tuple[nn.Parameter, Piece]]:
    """Yield the pieces of ZeRO-3."""
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for parameter in group:
            _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            yield parameter, replace(piece_of(parameter), held=flat, offset=offset)
