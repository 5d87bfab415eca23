"""The sums over a warm-up's passes from which the support of one layer is chosen."""

from __future__ import annotations

import logging

import torch

from ...common.training.distributed import is_main_process, sum_over_ranks
from ...functional import SUPPORT_SCORES, ObservedGradient, select_supports
from ..adapter import LayerAdapter

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
