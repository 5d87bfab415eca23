"""The few collective operations that warm-ups and renewals need; without a process group each is the identity."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_of_process() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    return rank_of_process() == 0


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


def copy_buffers_from_main(module: torch.nn.Module) -> None:
    """Overwrite the buffers of `module` in place with those of rank 0."""
    for buffer in module.buffers():
        copy_from_main(buffer)


def agree(point: str, device: torch.device, way_out: str, ok: bool = True) -> bool:
    """Return whether `ok` is true on every rank, all of which must have come to the same point of the program.

    Call it before a collective operation that some rank may not come to, or may come to with another layer's tensor:
    that operation would wait for ever, or mix the two. This one has the same form at every point, and costs one small
    `all_reduce` whose result the host waits for.

    Args:
        point: Name of the point, such as "the gradient of 'model.layers.0.mlp.up_proj'".
        device: Device of the tensors that the ranks exchange there.
        way_out: End of the error's sentence, which tells the user what to do.
        ok: False if this rank cannot go on as planned.

    Raises:
        RuntimeError: On every rank alike, if they have come to different points.
    """
    if world_size() == 1:
        return ok
    number = zlib.crc32(point.encode())
    extremes = torch.tensor([number, -number, not ok], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    highest, minus_lowest, any_not_ok = extremes.tolist()
    if highest != -minus_lowest:
        points = [""] * world_size()
        dist.all_gather_object(points, point)
        other = next(rank for rank, theirs in enumerate(points) if theirs != points[0])
        raise RuntimeError(
            f"the ranks have come to different points, rank 0 to {points[0]} and rank {other} to {points[other]}: "
            f"{way_out}"
        )
    return not any_not_ok


def numbers_of_ranks(number: int, device: torch.device) -> list[int]:
    """Return the number that each rank passes, in the order of the ranks."""
    numbers = torch.zeros(world_size(), dtype=torch.int64, device=device)
    numbers[rank_of_process()] = number
    return sum_over_ranks(numbers).tolist()


def refuse_join(what: str) -> None:
    """Refuse a forward pass inside a `join` context of DDP, in which a rank may run out of batches before the others.

    DDP tells it in its forward pass alone, so this is called in the forward pass of a layer.

    Args:
        what: Beginning of the error's sentence, which names what needs all ranks.

    Raises:
        RuntimeError: If DDP is running a forward pass inside a `join` context, on each rank that has a batch.
    """
    running = DistributedDataParallel._get_active_ddp_module()
    if world_size() > 1 and running is not None and running._join_config.enable:
        raise RuntimeError(
            f"{what} needs all ranks in every pass, and inside a `join` context of DDP some may end early: give every "
            "rank the same number of batches and train without `join`"
        )
