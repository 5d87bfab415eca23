"""The piece of a parameter that an optimizer moves on this rank: all of it, or a stretch of a sharded one.

FSDP2 cuts each parameter into a piece for each rank, DeepSpeed ZeRO joins parameters to flat tensors and cuts those.
Whatever is done to the values of a parameter between the optimizer's reading and writing is done to the piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Piece:
    """A stretch of a flattened parameter, as it lies in the tensor that an optimizer holds.

    Attributes:
        held: Tensor under which the optimizer keeps its state: the parameter itself or, with DeepSpeed, a flat one.
        size: Number of entries of the whole parameter.
        start: Position of the piece in the flattened parameter.
        length: Number of entries of the piece; 0 if this rank has none of the parameter.
        offset: Position of the piece among the entries of `held` on this rank.
        group: Ranks that have a piece of the parameter each; None for a parameter that is whole on every rank.
    """

    held: torch.Tensor
    size: int
    start: int
    length: int
    offset: int = 0
    group: Any = None

    @property
    def is_whole(self) -> bool:
        """True if this rank has the whole parameter, which the optimizer holds as it is."""
        return self.group is None

    @property
    def values(self) -> torch.Tensor:
        """The values, shape (length,), in the memory of `held`."""
        return self.of(self.held)

    @property
    def gradient(self) -> torch.Tensor | None:
        """The gradient that a step is taken with, shape (length,), in its memory; None if there is none."""
        return None if self.held.grad is None else self.of(self.held.grad)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the piece, shape (length,), of a tensor with the shape of `held`: its gradient or state."""
        flat = local_part(tensor.detach()).reshape(-1)
        return flat[self.offset : self.offset + self.length]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the piece, shape (length,), of a tensor (size,) that every rank has, on the device of `held`."""
        return whole[self.start : self.start + self.length].to(local_part(self.held).device)

    def joined(self, part: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Return the tensor (size,) of which every rank passes its piece (length,); a collective operation.

        Args:
            part: Piece on this rank.
            device: Device of the result, which the process group can work on; None for that of `part`.
        """
        if self.is_whole:
            return part
        whole = torch.zeros(self.size, dtype=part.dtype, device=device or part.device)
        whole[self.start : self.start + self.length] = part.to(whole.device)
        dist.all_reduce(whole, group=self.group)
        return whole

    def any(self, flags: torch.Tensor, device: torch.device | None = None) -> bool:
        """Return whether any flag of the piece (length,) is true on any rank; a collective operation."""
        found = flags.any()
        if not self.is_whole:
            found = found.to(device or found.device, torch.int32)
            dist.all_reduce(found, group=self.group)
        return bool(found)


def piece_of(parameter: nn.Parameter) -> Piece:
    """Return this rank's piece of a parameter that is a tensor, a DTensor, or partitioned by ZeRO-3.

    Raises:
        ValueError: If the parameter is split along another dimension than the first, or along two.
    """
    if hasattr(parameter, "ds_tensor"):
        return _piece_of_partition(parameter)
    if not is_dtensor(parameter):
        return Piece(parameter, parameter.numel(), 0, parameter.numel())
    mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore[reportAttributeAccessIssue]
    split = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return Piece(parameter, parameter.numel(), 0, parameter.numel())
    if len(split) > 1 or not placements[split[0]].is_shard(0):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is split as {placements}: only a split along the first "
            "dimension is possible, which is the default of `fully_shard`"
        )
    rows, row = parameter.shape[0], parameter.shape[1:].numel()
    rows_of_rank = -(-rows // mesh.size(split[0]))
    start = min(mesh.get_local_rank(split[0]) * rows_of_rank, rows) * row
    return Piece(parameter, rows * row, start, local_part(parameter).numel(), group=mesh.get_group(split[0]))


def _piece_of_partition(parameter: Any) -> Piece:
    """Return the piece of a parameter that ZeRO-3 has cut into as many padded pieces as there are ranks."""
    size, padded, ranks = parameter.ds_numel, parameter.partition_numel(), parameter.ds_process_group
    start = min(dist.get_rank(ranks) * padded, size)
    return Piece(parameter.ds_tensor, size, start, min(padded, size - start), group=ranks)


def refuse_views(tensor: torch.Tensor, purpose: str, way_out: str) -> None:
    """Raise a RuntimeError in a forward pass for a parameter that is a view of another, as FSDP1 makes of all.

    Args:
        tensor: The parameter as the forward pass sees it.
        purpose: The action that needs the parameter itself.
        way_out: An alternative to FSDP2.
    """
    if not tensor.is_leaf:
        raise RuntimeError(
            f"FSDP1 gives the layers views of its flat parameter, and one cannot {purpose} with that: use FSDP2 "
            f"(`fully_shard`, in accelerate `fsdp_version: 2`), or {way_out}"
        )


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this rank may have only a part."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor, in its memory, also of a parameter that ZeRO-3 has partitioned."""
    if is_dtensor(tensor):
        return tensor._local_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return getattr(tensor, "ds_tensor", tensor)
