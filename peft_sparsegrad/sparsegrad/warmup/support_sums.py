"""The sums over a warm-up's passes from which the support of one layer is chosen."""

from __future__ import annotations

import logging

import torch

from ...common.training.distributed import is_main_process, sum_over_ranks
from ...functional import SUPPORT_SCORES, ObservedGradient, select_supports
from ..adapter import LayerAdapter

logger = logging.getLogger("peft_sparsegrad")


class SupportSums:
    """The sum of the support's score over the passes of one layer, and the energies of the first pass.

    Attributes:
        scored: Sum of the score, of the core's shape.
        squared: G̃² of the layer's first pass with a gradient, of the core's shape.
        total: ‖G‖² of that pass. In each pass it would cost as much as the gradient of the whole weight.
    """

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
        if not self.total:
            self.squared += in_core.square()
            self.total = gradient.energy().item()

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
        is_idle = ~scores.any(1)
        if is_main_process() and 0 < (idle := int(is_idle.sum())) < plan.num_experts:
            logger.warning(
                "SparseGrad's warm-up saw no token at %d of the %d experts of %r: their supports are those of the "
                "other experts' gradients together.",
                *(idle, plan.num_experts, plan.name),
            )
        return select_supports(torch.where(is_idle.unsqueeze(1), scores.sum(0), scores), plan.k_of_expert)

    @property
    def has_gradient(self) -> bool:
        """True if any entry of the core had a gradient."""
        return bool(self.scored.any())

    @property
    def energy_in_core(self) -> float:
        """Energy ‖G̃‖² of all entries of the core."""
        return self.squared.sum().item()

    @property
    def energy_in_support(self) -> float:
        """Energy of the chosen entries."""
        return self.squared.flatten()[self.adapter.indices].sum().item()
