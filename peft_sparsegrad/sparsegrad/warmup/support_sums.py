"""The sums over a warm-up's passes from which the support of one layer is chosen, and the report of them."""

from __future__ import annotations

import logging
import math
from statistics import median

import torch

from ...common.targets.modules import role_of
from ...common.training.distributed import is_main_process, sum_over_ranks
from ...functional import SUPPORT_SCORES, Hosvd, ObservedGradient, select_supports
from ..adapter import LayerAdapter
from ..basis import Basis
from .report import GroupReport

logger = logging.getLogger("peft_sparsegrad")


class SupportSums:
    """Sums for one layer: that of the support's score and Σ G̃², both of the core's shape, and Σ ‖G‖²."""

    def __init__(self, adapter: LayerAdapter, dtype: torch.dtype) -> None:
        self.adapter, self.total = adapter, 0.0
        self._score = SUPPORT_SCORES[adapter.plan.support_score]
        shape, device = adapter.plan.core_shape, adapter.values.device
        dtype = torch.promote_types(dtype, torch.float32)
        self.scored = torch.zeros(shape, dtype=dtype, device=device)
        self.squared = torch.zeros_like(self.scored)

    def update(self, gradient: ObservedGradient) -> None:
        """Add one backward pass."""
        in_core = gradient.in_core(self.adapter.basis.U, self.adapter.basis.V)
        self.scored += self._score.of_pass(in_core)
        self.squared += in_core.square()
        self.total += gradient.energy().item()

    def reduce(self) -> None:
        """Sum over the ranks, each of which has observed its own share of every batch."""
        sum_over_ranks(self.scored)
        sum_over_ranks(self.squared)
        self.total = sum_over_ranks(self.squared.new_tensor([self.total], dtype=torch.float64)).item()

    @property
    def score(self) -> torch.Tensor:
        """Score of each entry of the core, shape (r_out, r_in); larger is better."""
        return self._score.of_total(self.scored)

    def support(self) -> torch.Tensor:
        """Return the entries with the highest score of each expert, as flat positions in the core, int64 (k,).

        An expert that no token has come to is given the entries with the highest sum of the others' scores.
        """
        plan = self.adapter.plan
        scores = self.score.view(plan.num_experts, -1)
        is_idle = ~self.squared.view_as(scores).any(1)
        if is_main_process() and 0 < (idle := int(is_idle.sum())) < plan.num_experts:
            logger.warning(
                "SparseGrad's warm-up saw no token at %d of the %d experts of %r: their supports are those of the "
                "other experts' gradients together.",
                *(idle, plan.num_experts, plan.name),
            )
        return select_supports(torch.where(is_idle.unsqueeze(1), scores.sum(0), scores), plan.k_of_expert)

    @property
    def energy_in_core(self) -> float:
        """Energy Σ ‖G̃‖² of all entries of the core."""
        return self.squared.sum().item()

    @property
    def energy_in_support(self) -> float:
        """Energy Σ G̃² of the chosen entries."""
        return self.squared.flatten()[self.adapter.indices].sum().item()


def group_report(
    adapters: list[LayerAdapter], found: dict[Basis, Hosvd], sums: dict[LayerAdapter, SupportSums]
) -> GroupReport:
    """Return the report of the corresponding layers of all blocks.

    Args:
        adapters: The adapter on each layer of the group.
        found: The bases that the warm-up has found; without those known before, and on other ranks than 0 empty.
        sums: Sums of the layers, complete; without those that had no gradient.
    """
    plan = adapters[0].plan
    own = [sums[adapter] for adapter in adapters if adapter in sums and sums[adapter].total]
    in_core = {each.adapter.plan.name: each.energy_in_core / each.total for each in own}
    in_support = {each.adapter.plan.name: each.energy_in_support / each.total for each in own}
    num_entries = math.prod(plan.parameter_shape)
    bases = {adapter.basis for adapter in adapters}
    common = found.get(adapters[0].basis) if len(bases) == 1 else None  # bases of their own have no common spectrum
    return GroupReport(
        name=role_of(plan.name),
        num_layers=len(adapters),
        weight_shape=plan.weight_shape,
        core_shape=plan.core_shape,
        num_values=plan.k,
        method=common.method if common else plan.basis,
        energy_in_core=median(in_core.values()) if own else None,
        energy_in_support=median(in_support.values()) if own else None,
        chance_in_core=plan.num_entries / num_entries,
        chance_in_support=plan.k / num_entries,
        core_of_layers=in_core,
        support_of_layers=in_support,
        energy=common.energy if common else None,
        spectrum_in=common.spectrum_in.tolist() if common else [],
        spectrum_out=common.spectrum_out.tolist() if common else [],
    )
