"""The probe for the share of a step's gradient that the core and the support of an adapter hold."""

from __future__ import annotations

from statistics import median

import torch

from ..common.training.distributed import sum_over_ranks
from ..functional import ObservedGradient
from .adapter import LayerAdapter


class EnergyProbe:
    """Observer that measures, for one step, the shares of the gradient's energy Σ‖G‖² in core and support.

    Args:
        adapters: The adapter on each of its layers.
    """

    def __init__(self, adapters: list[LayerAdapter]) -> None:
        self.rows = {adapter: row for row, adapter in enumerate(adapters)}
        # of each layer: of the full gradient, in the core, on the support
        self.energies = torch.zeros(len(adapters), 3, dtype=torch.float64)
        for adapter in adapters:
            adapter.probe = self

    def __call__(self, adapter: LayerAdapter, gradient: ObservedGradient) -> bool:
        """Add one backward pass of one layer; return True, as any gradient is usable."""
        core = gradient.in_core(adapter.basis.U, adapter.basis.V).flatten().square()
        held = core.topk(adapter.plan.k).values if adapter.plan.dynamic else core[adapter.indices]
        self.energies[self.rows[adapter]] += torch.stack([gradient.energy(), core.sum(), held.sum()]).double().cpu()
        return True

    def stop(self) -> None:
        """Stop measuring."""
        for adapter in self.rows:
            adapter.probe = None

    def finish(self) -> dict[str, float]:
        """Stop measuring, and return the medians over the layers of `energy_in_core` and `energy_in_support`.

        One layer may have more energy than all others together, so that a sum over them would tell of it alone. The
        result is {} if no gradient was seen.
        """
        self.stop()
        device = next(iter(self.rows)).values.device
        of_layers = sum_over_ranks(self.energies.to(device)).tolist()
        shares = [(core / total, support / total) for total, core, support in of_layers if total]
        if not shares:
            return {}
        in_core, in_support = map(median, zip(*shares, strict=True))
        return {"energy_in_core": in_core, "energy_in_support": in_support}
