"""The agreement of all ranks in a warm-up, whose collective operations lie inside the backward passes."""

from __future__ import annotations

import torch

from ...common.training.distributed import agree, sum_over_ranks, world_size
from ..adapter import LayerAdapter

WAY_OUT = (
    "let every rank run the same layers in the same number of passes, or warm the adapter up in one process and load "
    "it from its file"
)


class WarmUpRanks:
    """The ranks of a warm-up, which must all run the same layers in the same order.

    Args:
        adapters: The adapter on each of its layers.

    Attributes:
        device: Device of the tensors that the ranks exchange.
        entered: Layers that forward passes have come to since the last backward pass.
    """

    def __init__(self, adapters: list[LayerAdapter]) -> None:
        self._adapters, self.device = adapters, adapters[0].values.device
        self.entered: set[LayerAdapter] = set()

    def come_to(self, point: str, ok: bool = True) -> bool:
        """Return whether `ok` is true on every rank; see `agree`."""
        return agree(point, self.device, WAY_OUT, ok)

    def begin_backward(self) -> None:
        """Check at the first gradient of a backward pass that the forward pass came to the same layers on all ranks.

        A layer that ran on some ranks only would be noticed at its gradient as well, but under DDP perhaps too late: a
        rank that has no more layers to come waits there for the gradients of the others.

        Raises:
            RuntimeError: On every rank, if it did not.
        """
        first, last = self._adapters[0].plan.name, self._adapters[-1].plan.name
        self.come_to(f"the backward pass of a model with {len(self._adapters)} adapted layers, {first!r} to {last!r}")
        counts = self._number_of_ranks(self.entered)
        self.entered.clear()
        names = [adapter.plan.name for adapter, count in counts.items() if 0 < count < world_size()]
        if names:
            raise RuntimeError(f"some ranks run the layers {names} in a pass and others do not: {WAY_OUT}")

    def on_any(self, adapters: set[LayerAdapter]) -> set[LayerAdapter]:
        """Return the layers that are in the set of any rank."""
        return {adapter for adapter, count in self._number_of_ranks(adapters).items() if count}

    def _number_of_ranks(self, adapters: set[LayerAdapter]) -> dict[LayerAdapter, int]:
        """Return the number of ranks in whose set each layer is."""
        own = torch.tensor([adapter in adapters for adapter in self._adapters], dtype=torch.int64, device=self.device)
        return dict(zip(self._adapters, sum_over_ranks(own).tolist(), strict=True))
