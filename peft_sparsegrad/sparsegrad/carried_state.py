"""What an optimizer's state dict carries of one layer: the slots of its values, and what the next renewal goes by.

`optimizer_state.py` says why it travels there.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..common.training.distributed import rank_of_process, world_size
from ..common.training.pieces import Piece, is_dtensor
from .core_gradient import CoreGradient

if TYPE_CHECKING:
    from .adapter import LayerAdapter


class CarriedState:
    """State of one layer's training that a run needs to go on, beside the adapter and the optimizer's moments.

    Args:
        adapter: The adapter on the layer.
        core_gradient: Gradient of its whole core.

    Attributes:
        is_gathered: True if the total is the mean of all ranks'. A step makes it this rank's again.
    """

    def __init__(self, adapter: LayerAdapter, core_gradient: CoreGradient) -> None:
        self.adapter, self.core_gradient = adapter, core_gradient
        self.is_gathered = False

    def gather(self) -> None:
        """Give each rank the mean of all totals, so that a checkpoint of any rank has it; a collective operation."""
        if world_size() > 1 and not self.is_gathered:
            self.core_gradient.total = self.core_gradient.mean_over_ranks(self._device)
            self.is_gathered = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the positions of the values and the total from which the next support is chosen.

        Under FSDP2, where all ranks save, it is a collective operation.

        Returns:
            `indices`: position of each value, int32 (k,). `total`: total of the core's gradient, (r_out, r_in), and
            empty if the support is not renewed.
            `share`: number of ranks of whose totals it is one, and the number of this rank, int64 (2,); after `gather`
            one rank, 0. All are tensors of fixed shapes, as torch's distributed checkpoints need them.
        """
        if is_dtensor(self.adapter.values):
            self.gather()
        total, share = self.core_gradient.total, [1, 0] if self.is_gathered else [world_size(), rank_of_process()]
        if total is None:
            plan = self.adapter.plan
            total = torch.zeros(plan.core_shape if plan.renewal_steps else 0, device=self._device)
        return {"indices": self._positions.int(), "total": total, "share": torch.tensor(share)}

    def load(self, state: dict[str, Any], piece: Piece) -> None:
        """Restore what `state_dict` returned, and put the values into the slots to which the moments belong.

        Args:
            state: What `state_dict` returned.
            piece: Piece of the values that the optimizer holds.

        Raises:
            RuntimeError: If the state is that of another support.
        """
        own, indices = self._positions, state["indices"].to(self._device).long()
        order, rank = own.argsort(), indices.argsort().argsort()
        if not torch.equal(own[order[rank]], indices):
            raise RuntimeError(
                f"the optimizer's state is for other entries of {self.adapter.plan.name!r} than the adapter has: load "
                "the optimizer and the adapter from the same checkpoint, or begin with a new optimizer"
            )
        if not torch.equal(own, indices):
            for part in (piece.values, piece.gradient):
                if part is not None:
                    part.copy_(piece.cut(piece.joined(part, self._device)[order[rank]]))
            self.adapter.place(indices)
            self.adapter.prepare()
        self._load_total(state["total"].to(self._device, torch.float32), *state["share"].tolist())

    def _load_total(self, total: torch.Tensor, ranks: int, rank: int) -> None:
        is_own = ranks == world_size() and rank == rank_of_process()
        if ranks > 1 and not is_own and bool(total.any()):
            warnings.warn(
                f"The checkpoint was written by one of {ranks} ranks, without the gradients of the others: the next "
                "renewal of the supports goes by its share of them. `SparseGradCallback` saves those of all ranks.",
                stacklevel=2,
            )
        self.core_gradient.total = total.clone() if bool(total.any()) else None

    @property
    def was_sorted(self) -> bool:
        """True if the values were in another order before they were saved, as they are after a renewal."""
        slots, first = self.adapter.slots, self.adapter.plan.renewal_steps
        if slots is None or not 0 < first <= self.adapter.num_steps:
            return False
        return bool((slots.diff() == 1).all())

    @property
    def _positions(self) -> torch.Tensor:
        assert self.adapter.indices is not None, "a dense core has no slots"
        return self.adapter.indices

    @property
    def _device(self) -> torch.device:
        return self.adapter.steps.device
