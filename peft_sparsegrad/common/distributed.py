"""The few collective operations that the warm-up needs; without a process group each is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    return world_size() == 1 or dist.get_rank() == 0


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Average `tensor` over all ranks, in place."""
    return sum_over_ranks(tensor).div_(world_size()) if world_size() > 1 else tensor


def copy_from_main(tensor: torch.Tensor) -> None:
    """Overwrite `tensor` in place with the tensor of rank 0."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
