"""The collector behind every way of running the warm-up (SparseGrad, section 3.1).

It observes x and ∂L/∂y of every adapted layer in the backward pass, so no weight has to be unfrozen and a quantised
base warms up like any other. It goes through its batches in sweeps: one or more for the basis of each group, and then,
for a static support, one for the sums of `G̃ = Vᵀ G U` and `G̃²` from which each layer's entries are chosen.
"""

from __future__ import annotations

import logging
import time

import torch

from ..common.distributed import copy_from_main, is_main_process, mean_over_ranks, sum_over_ranks
from ..functional import (
    SUPPORT_SCORES,
    ExactHosvd,
    Hosvd,
    SketchedHosvd,
    core_gradient,
    gradient_energy,
    hosvd_accumulator,
    select_support,
)
from .adapter import LayerAdapter
from .basis import Basis
from .report import GroupReport, WarmUpReport

logger = logging.getLogger("peft_sparsegrad")


class WarmUpCollector:
    """Observer that collects the gradients of one adapter and settles its bases and supports.

    Args:
        adapter_name: Name of the adapter.
        adapters: The adapter on each of its layers.
        needs_basis: False if the bases are known already, from a file, from the weights, or as the identity.
        budget: Number of backward passes to observe in all, after which sweeps end by themselves; with None,
            `end_sweep` ends them.
    """

    def __init__(
        self, adapter_name: str, adapters: list[LayerAdapter], needs_basis: bool, budget: int | None = None
    ) -> None:
        self.adapter_name, self.adapters, self.budget = adapter_name, adapters, budget
        self.needs_support = not adapters[0].plan.dynamic
        self.groups: dict[Basis, list[LayerAdapter]] = {}
        for adapter in adapters:
            self.groups.setdefault(adapter.basis, []).append(adapter)
        self.stage = "basis" if needs_basis else "support"
        self.hosvd: dict[Basis, ExactHosvd | SketchedHosvd] = {}
        self.found: dict[Basis, Hosvd] = {}
        self.sums: dict[LayerAdapter, _SupportSums] = {}
        self.counts = dict.fromkeys(adapters, 0)
        self.basis_sweeps, self.passes, self.started = 0, 0, time.perf_counter()
        self.report: WarmUpReport | None = None

    @property
    def done(self) -> bool:
        """True once all bases and supports are settled."""
        return self.stage == "done"

    @property
    def passes_watched(self) -> int:
        """Number of backward passes observed so far."""
        return self.passes + max(self.counts.values())

    def __call__(self, adapter: LayerAdapter, x: torch.Tensor, dy: torch.Tensor) -> bool:
        """Add one backward pass of one layer, x (tokens, in) and dy (tokens, out); return False for an overflow."""
        if self.done:
            return True
        if not self._is_finite(adapter, x, dy):
            return False
        if self._passes_in_sweep() is not None and self.counts[adapter] == self._passes_in_sweep():
            self.end_sweep()  # other layers lag behind if they are not used in every forward pass
            if self.done:
                return True
        if self.stage == "basis":
            self._accumulator(adapter.basis, x.device).update(x, dy, mean_over_ranks)
        else:
            if adapter not in self.sums:
                self.sums[adapter] = _SupportSums(adapter, x.dtype)
            self.sums[adapter].update(x, dy)
        self.counts[adapter] += 1
        if all(count == self._passes_in_sweep() for count in self.counts.values()):
            self.end_sweep()
        return True

    def end_sweep(self) -> bool:
        """End a sweep over the batches, and return whether the warm-up is finished."""
        self._check_observed()
        self.passes += max(self.counts.values())
        self.counts = dict.fromkeys(self.adapters, 0)
        if self.stage == "support":
            self._settle()
            return True
        self.basis_sweeps += 1
        settled = [accumulator.finish_pass(mean_over_ranks) for accumulator in self.hosvd.values()]
        if all(settled) or (self.budget is not None and self.basis_sweeps == self._basis_sweeps_planned()):
            self._fill_in_bases()
            self.stage = "support"
            if not self.needs_support:
                self._settle()
        return self.done

    def _passes_in_sweep(self) -> int | None:
        """Return the number of backward passes in the current sweep, or None without a budget.

        Half of the budget is for the bases.
        """
        if self.budget is None:
            return None
        for_bases = self.budget if not self.needs_support else self.budget // 2
        if self.stage == "basis":
            return max(1, for_bases // self._basis_sweeps_planned())
        return max(1, self.budget - self.passes)

    def _basis_sweeps_planned(self) -> int:
        sketched = any(isinstance(accumulator, SketchedHosvd) for accumulator in self.hosvd.values())
        return 2 if sketched and self.budget is not None and self.budget >= 4 else 1

    def _accumulator(self, basis: Basis, device: torch.device) -> ExactHosvd | SketchedHosvd:
        if basis not in self.hosvd:
            self.hosvd[basis] = hosvd_accumulator(*basis.weight_shape, basis.ranks, device)
        return self.hosvd[basis]

    def _is_finite(self, adapter: LayerAdapter, x: torch.Tensor, dy: torch.Tensor) -> bool:
        if bool(torch.isfinite(dy).all()) and bool(torch.isfinite(x).all()):
            return True
        name = adapter.plan.name
        if dy.dtype == torch.float16:  # the loss scale is still being adjusted, and the optimizer skips such steps too
            logger.warning("SparseGrad's warm-up leaves out a float16 gradient of %r that overflowed.", name)
            return False
        raise ValueError(
            f"SparseGrad's warm-up met NaN or Inf in the gradient of module {name!r}: check the batch and its labels, "
            "or lower the learning rate of what trains during the warm-up."
        )

    def _check_observed(self) -> None:
        if not any(self.counts.values()):
            raise ValueError(
                "SparseGrad's warm-up saw no gradient: the batches must run a forward and a backward pass through "
                "the adapted layers, with gradients enabled and the adapter active."
            )
        for adapters in self.groups.values():
            names = [adapter.plan.name for adapter in adapters if not self.counts[adapter]]
            if len(names) == len(adapters):
                raise ValueError(
                    f"SparseGrad's warm-up saw no gradient of the modules {names}: they are not part of the loss. "
                    "Name them in `exclude_modules`."
                )
            if names and self.stage == "support":
                logger.warning("SparseGrad's warm-up saw no gradient of %s; their supports are data-free.", names)

    def _fill_in_bases(self) -> None:
        for basis, accumulator in self.hosvd.items():
            if is_main_process():
                self.found[basis] = accumulator.result()
                basis.fill(self.found[basis].U, self.found[basis].V)
            _copy_buffers_from_main(basis)
        self.hosvd.clear()

    def _settle(self) -> None:
        for adapter in self.adapters:
            if adapter in self.sums:
                self.sums[adapter].reduce()
                adapter.settle(select_support(self.sums[adapter].score, adapter.plan.k))
            else:
                adapter.settle()
            _copy_buffers_from_main(adapter)
            adapter.warmup = None
        self.stage = "done"
        self.report = self._make_report()
        self.sums.clear()
        if self.budget is not None and is_main_process():
            logger.warning("SparseGrad's warm-up is done; training starts.\n%s", self.report)

    def _make_report(self) -> WarmUpReport:
        seconds = time.perf_counter() - self.started
        groups = [self._group_report(basis, adapters) for basis, adapters in self.groups.items()]
        return WarmUpReport(self.adapter_name, self.passes, seconds, groups)

    def _group_report(self, basis: Basis, adapters: list[LayerAdapter]) -> GroupReport:
        plan, found = adapters[0].plan, self.found.get(basis)
        sums = [self.sums[adapter] for adapter in adapters if adapter in self.sums]
        total = sum(each.total for each in sums)
        return GroupReport(
            name=plan.role,
            num_layers=len(adapters),
            weight_shape=plan.weight_shape,
            core_shape=plan.core_shape,
            num_values=plan.k,
            method=found.method if found else plan.basis,
            energy_in_core=sum(each.energy_in_core for each in sums) / total if total else None,
            energy_in_support=sum(each.energy_in_support for each in sums) / total if total else None,
            spectrum_in=found.spectrum_in.tolist() if found else [],
            spectrum_out=found.spectrum_out.tolist() if found else [],
        )


class _SupportSums:
    """Sums for one layer: that of the support's score and Σ G̃², both (r_out, r_in), and Σ ‖G‖²."""

    def __init__(self, adapter: LayerAdapter, x_dtype: torch.dtype) -> None:
        self.adapter, self.total = adapter, 0.0
        self._score = SUPPORT_SCORES[adapter.plan.support_score]
        shape, device = adapter.plan.core_shape, adapter.values.device
        dtype = torch.promote_types(x_dtype, torch.float32)
        self.scored = torch.zeros(shape, dtype=dtype, device=device)
        self.squared = torch.zeros_like(self.scored)

    def update(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Add one backward pass with x (tokens, in) and dy (tokens, out)."""
        gradient = core_gradient(x, dy, self.adapter.basis.U, self.adapter.basis.V)
        self._score.add_(self.scored, gradient)
        self.squared += gradient.square()
        self.total += gradient_energy(x, dy).item()

    def reduce(self) -> None:
        """Sum over the ranks, each of which has observed its own share of every batch."""
        sum_over_ranks(self.scored)
        sum_over_ranks(self.squared)
        self.total = sum_over_ranks(self.squared.new_tensor([self.total], dtype=torch.float64)).item()

    @property
    def score(self) -> torch.Tensor:
        """Score of each entry of the core, shape (r_out, r_in); larger is better."""
        return self._score.of(self.scored)

    @property
    def energy_in_core(self) -> float:
        """Energy Σ ‖G̃‖² of all entries of the core."""
        return self.squared.sum().item()

    @property
    def energy_in_support(self) -> float:
        """Energy Σ G̃² of the chosen entries."""
        return self.squared.flatten()[self.adapter.indices].sum().item()


def _copy_buffers_from_main(module: torch.nn.Module) -> None:
    for buffer in module.buffers():
        copy_from_main(buffer)
