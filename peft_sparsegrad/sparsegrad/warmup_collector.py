"""The collector behind every way of running the warm-up (SparseGrad, section 3.1).

It watches x and ∂L/∂y of every adapted layer in the backward pass, so no weight has to be unfrozen and a quantised
base warms up like any other. It goes through its batches in sweeps: one or more for the basis of each group, then,
for a static support, one for the sums of `G̃ = Vᵀ G U` and `G̃²` from which each layer's entries are chosen.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from ..common.distributed import copy_from_main, is_main_process, mean_over_ranks, sum_over_ranks
from ..functional import (
    ExactHosvd,
    Hosvd,
    SketchedHosvd,
    core_gradient,
    gradient_energy,
    hosvd_accumulator,
    select_support,
)
from .report import GroupReport, WarmUpReport
from .state import TransitionMatrices

if TYPE_CHECKING:
    from .layer import SparseGradLayer

logger = logging.getLogger("peft_sparsegrad")


class WarmUp:
    """Collects the gradients of one adapter and settles its bases and supports.

    Args:
        adapter_name: The adapter.
        layers: Its layers.
        needs_basis: False where the bases are there already, from a file, from the weights, or as the identity.
        budget: Backward passes to watch in all; the sweeps then end by themselves. None: `end_sweep` ends them.
    """

    def __init__(
        self, adapter_name: str, layers: list[SparseGradLayer], needs_basis: bool, budget: int | None = None
    ) -> None:
        self.adapter_name, self.layers, self.budget = adapter_name, layers, budget
        plans = [layer.adapter(adapter_name).plan for layer in layers]
        self.needs_support = not plans[0].dynamic
        self.groups: dict[TransitionMatrices, list[SparseGradLayer]] = {}
        for layer in layers:
            self.groups.setdefault(layer.adapter(adapter_name).group, []).append(layer)
        self.stage = "basis" if needs_basis else "support"
        self.hosvd: dict[TransitionMatrices, ExactHosvd | SketchedHosvd] = {}
        self.found: dict[TransitionMatrices, Hosvd] = {}
        self.sums: dict[SparseGradLayer, _SupportSums] = {}
        self.counts = dict.fromkeys(layers, 0)
        self.basis_sweeps, self.passes, self.started = 0, 0, time.perf_counter()
        self.report: WarmUpReport | None = None

    @property
    def done(self) -> bool:
        return self.stage == "done"

    @property
    def passes_watched(self) -> int:
        return self.passes + max(self.counts.values())

    def __call__(self, layer: SparseGradLayer, x: torch.Tensor, dy: torch.Tensor) -> bool:
        """Take in one backward pass of one layer; x (tokens, in), dy (tokens, out). False for an overflow."""
        if self.done:
            return True
        if not self._is_finite(layer, x, dy):
            return False
        if self._passes_in_sweep() is not None and self.counts[layer] == self._passes_in_sweep():
            self.end_sweep()  # other layers lag behind: they are not used in every forward pass
            if self.done:
                return True
        if self.stage == "basis":
            self._accumulator(layer, x.device).update(x, dy, mean_over_ranks)
        else:
            group = layer.adapter(self.adapter_name).group
            self.sums.setdefault(layer, _SupportSums()).update(x, dy, *group.on(x.device, torch.float32))
        self.counts[layer] += 1
        if all(count == self._passes_in_sweep() for count in self.counts.values()):
            self.end_sweep()
        return True

    def end_sweep(self) -> bool:
        """End a sweep over the batches. Returns whether the warm-up is finished."""
        self._check_observed()
        self.passes += max(self.counts.values())
        self.counts = dict.fromkeys(self.layers, 0)
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
        """Backward passes in the current sweep, where the budget sets them; half of all are for the bases."""
        if self.budget is None:
            return None
        for_bases = self.budget if not self.needs_support else self.budget // 2
        if self.stage == "basis":
            return max(1, for_bases // self._basis_sweeps_planned())
        return max(1, self.budget - self.passes)

    def _basis_sweeps_planned(self) -> int:
        sketched = any(isinstance(accumulator, SketchedHosvd) for accumulator in self.hosvd.values())
        return 2 if sketched and self.budget is not None and self.budget >= 4 else 1

    def _accumulator(self, layer: SparseGradLayer, device: torch.device) -> ExactHosvd | SketchedHosvd:
        group = layer.adapter(self.adapter_name).group
        if group not in self.hosvd:
            self.hosvd[group] = hosvd_accumulator(*group.shape, group.ranks, device)
        return self.hosvd[group]

    def _is_finite(self, layer: SparseGradLayer, x: torch.Tensor, dy: torch.Tensor) -> bool:
        if bool(torch.isfinite(dy).all()) and bool(torch.isfinite(x).all()):
            return True
        name = layer.adapter(self.adapter_name).plan.name
        if dy.dtype == torch.float16:  # the loss scale is still being found; the optimizer skips such steps too
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
        for layers in self.groups.values():
            names = [layer.adapter(self.adapter_name).plan.name for layer in layers if not self.counts[layer]]
            if len(names) == len(layers):
                raise ValueError(
                    f"SparseGrad's warm-up saw no gradient of the modules {names}: they are not part of the loss. "
                    "Name them in `exclude_modules`."
                )
            if names and self.stage == "support":
                logger.warning("SparseGrad's warm-up saw no gradient of %s; their supports are data-free.", names)

    def _fill_in_bases(self) -> None:
        for group, accumulator in self.hosvd.items():
            if is_main_process():
                self.found[group] = accumulator.result()
                group.fill(self.found[group].U, self.found[group].V)
            _copy_buffers_from_main(group)
        self.hosvd.clear()

    def _settle(self) -> None:
        for layer in self.layers:
            support = layer.adapter(self.adapter_name).support
            if layer in self.sums:
                sums, plan = self.sums[layer], layer.adapter(self.adapter_name).plan
                sums.reduce()
                support.settle(select_support(sums.score(plan.support_score), plan.k))
            else:
                support.settle()
            _copy_buffers_from_main(support)
            layer.sparsegrad_warmup.pop(self.adapter_name, None)
        self.stage = "done"
        self.report = self._make_report()
        self.sums.clear()
        if self.budget is not None and is_main_process():
            logger.warning("SparseGrad's warm-up is done; training starts.\n%s", self.report)

    def _make_report(self) -> WarmUpReport:
        seconds = time.perf_counter() - self.started
        groups = [self._group_report(group, layers) for group, layers in self.groups.items()]
        return WarmUpReport(self.adapter_name, self.passes, seconds, groups)

    def _group_report(self, group: TransitionMatrices, layers: list[SparseGradLayer]) -> GroupReport:
        plan, found = layers[0].adapter(self.adapter_name).plan, self.found.get(group)
        watched = [layer for layer in layers if layer in self.sums]
        total = sum(self.sums[layer].total for layer in watched)
        core = sum(self.sums[layer].squared.sum().item() for layer in watched)
        inside = sum(
            self.sums[layer].squared.flatten()[layer.adapter(self.adapter_name).support.indices].sum().item()
            for layer in watched
        )
        return GroupReport(
            name=plan.role,
            num_layers=len(layers),
            weight_shape=plan.weight_shape,
            core_shape=plan.core_shape,
            num_values=plan.k,
            method=found.method if found else plan.basis,
            energy_in_core=core / total if total else None,
            energy_in_support=inside / total if total else None,
            spectrum_in=found.spectrum_in.tolist() if found else [],
            spectrum_out=found.spectrum_out.tolist() if found else [],
        )


class _SupportSums:
    """Σ G̃, Σ G̃² (r_out, r_in) and Σ ‖G‖² of one layer."""

    signed: torch.Tensor
    squared: torch.Tensor
    total: float = 0.0

    def update(self, x: torch.Tensor, dy: torch.Tensor, U: torch.Tensor | None, V: torch.Tensor | None) -> None:
        gradient = core_gradient(x, dy, U, V)
        if not hasattr(self, "signed"):
            self.signed, self.squared = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.signed += gradient
        self.squared += gradient.square()
        self.total += gradient_energy(x, dy).item()

    def reduce(self) -> None:
        """Sum over the ranks, each of which has seen its own share of every batch."""
        sum_over_ranks(self.signed)
        sum_over_ranks(self.squared)
        self.total = sum_over_ranks(self.squared.new_tensor([self.total], dtype=torch.float64)).item()

    def score(self, name: str) -> torch.Tensor:
        return self.signed.abs() if name == "mean" else self.squared


def _copy_buffers_from_main(module: torch.nn.Module) -> None:
    for buffer in module.buffers():
        copy_from_main(buffer)
