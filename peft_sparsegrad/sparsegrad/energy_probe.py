"""The probe for the share of a step's gradient that the core and the support of an adapter hold."""

from __future__ import annotations

import torch

from ..common.distributed import sum_over_ranks
from ..functional import ObservedGradient
from .adapter import LayerAdapter


class EnergyProbe:
    """Observer that measures, for one step, the shares of the gradient's energy Σ‖G‖² in core and support.

    Args:
        adapters: The adapter on each of its layers.
    """

    def __init__(self, adapters: list[LayerAdapter]) -> None:
        self.adapters = adapters
        self.energies = torch.zeros(3, dtype=torch.float64)  # of the full gradient, in the core, on the support
        for adapter in adapters:
            adapter.probe = self

    def __call__(self, adapter: LayerAdapter, gradient: ObservedGradient) -> bool:
        """Add one backward pass of one layer; return True, as any gradient is usable."""
        core = gradient.in_core(adapter.basis.U, adapter.basis.V).flatten().square()
        held = core.topk(adapter.plan.k).values if adapter.plan.dynamic else core[adapter.indices]
        self.energies += torch.stack([gradient.energy(), core.sum(), held.sum()]).double().cpu()
        return True

    def finish(self) -> dict[str, float]:
        """Stop measuring, and return the shares `energy_in_core` and `energy_in_support`; {} if nothing was seen."""
        for adapter in self.adapters:
            adapter.probe = None
        device = self.adapters[0].values.device
        everywhere, core, support = sum_over_ranks(self.energies.to(device)).tolist()
        if not everywhere:
            return {}
        return {"energy_in_core": core / everywhere, "energy_in_support": support / everywhere}
