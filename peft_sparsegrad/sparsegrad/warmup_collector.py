"""The collector behind every way of running the warm-up (SparseGrad, section 3.1).

It observes x and ∂L/∂y of every adapted layer in the backward pass, so no weight has to be unfrozen and a quantised
base warms up like any other. It goes through its batches in sweeps: one or more for the basis of each group, and then,
for a static support, one for the sums of `G̃ = Vᵀ G U` and `G̃²` from which each layer's entries are chosen.

A pass is a forward pass, or several, and the backward pass after it, however often it goes through a layer. Sweeps end
between passes: a backward pass that computes its forward pass again must find the layers as they were.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from ..common.distributed import copy_from_main, is_main_process, mean_over_ranks, refuse_join
from ..common.optimizer_watcher import OptimizerStep, forget, watch
from ..functional import (
    ExactHosvd,
    Hosvd,
    ObservedGradient,
    SketchedHosvd,
    hosvd_accumulator,
)
from .adapter import LayerAdapter
from .basis import Basis
from .report import WarmUpReport
from .support_sums import SupportSums, group_report
from .warmup_ranks import WarmUpRanks

logger = logging.getLogger("peft_sparsegrad")


class WarmUpCollector:
    """Observer that collects the gradients of one adapter and settles its bases and supports.

    Args:
        adapter_name: Name of the adapter.
        adapters: The adapter on each of its layers.
        needs_basis: False if the bases are known already, from a file, from the weights, or as the identity.
        budget: Number of passes to observe in all, after which sweeps end by themselves; with None, `end_sweep` ends
            them.

    Attributes:
        passes: Number of passes with a gradient that was not zero, in the sweeps that have ended.
        passed_over: Number of passes without one, which say nothing about the task.
        report: The report once the warm-up is done, else None.
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
        self.sums: dict[LayerAdapter, SupportSums] = {}
        self.seen: set[LayerAdapter] = set()  # layers with a gradient in this sweep
        self._ranks = WarmUpRanks(adapters)
        self.count, self.passes, self.passed_over = 0, 0, 0
        self._observed = self._has_signal = False
        self.basis_sweeps, self.started = 0, time.perf_counter()
        self.report: WarmUpReport | None = None
        if budget is not None:
            watch(self)

    @property
    def done(self) -> bool:
        """True once all bases and supports are settled."""
        return self.stage == "done"

    @property
    def passes_watched(self) -> int:
        """Number of passes observed so far."""
        return self.passes + self.count

    def __call__(self, adapter: LayerAdapter, gradient: ObservedGradient) -> bool:
        """Add one backward pass of one layer; return False for an overflow."""
        if self.done:
            return True
        of_loss = gradient.tensors[-1]
        self._ranks.device = of_loss.device
        if not self._observed:
            self._ranks.begin_backward()
        self._observed = True
        peaks = torch.stack([_peak(tensor) for tensor in gradient.tensors]).tolist()
        if not self._ranks.come_to(f"the gradient of {adapter.plan.name!r}", ok=all(map(math.isfinite, peaks))):
            return self._is_no_overflow(adapter, of_loss)
        if all(peaks):
            self._has_signal = True
            self.seen.add(adapter)
        if self.stage == "basis":
            gradient.add_to(self._accumulator(adapter.basis, of_loss.device), mean_over_ranks)
        else:
            if adapter not in self.sums:
                self.sums[adapter] = SupportSums(adapter, gradient.tensors[0].dtype)
            self.sums[adapter].update(gradient)
        return True

    def enter(self, adapter: LayerAdapter) -> None:
        """Note that a forward pass comes to a layer, and end the pass before it."""
        refuse_join("SparseGrad's warm-up")
        self.begin_pass()
        self._ranks.entered.add(adapter)

    def begin_pass(self) -> None:
        """End the pass before this one, and a sweep that is complete with it; call it outside of backward passes."""
        if self._observed:
            self._end_pass()
            while self.budget is not None and not self.done and self.count >= self._passes_in_sweep(self.budget):
                self.end_sweep()

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Return `begin_pass` for an optimizer that holds values, so that a checkpoint after its step is complete."""
        return self.begin_pass if any(step.updates(adapter.values) for adapter in self.adapters) else None

    def _end_pass(self) -> None:
        """Count a pass, on every rank if any of them had a gradient."""
        signal = not self._ranks.come_to("the end of a pass", ok=not self._has_signal)
        self.count += signal
        self.passed_over += not signal
        self._observed = self._has_signal = False

    def end_sweep(self) -> bool:
        """End a sweep over the batches, and return whether the warm-up is finished."""
        if self._observed:
            self._end_pass()
        self._ranks.come_to("the end of a sweep")
        self._check_observed(self._ranks.on_any(self.seen))
        self.passes += self.count
        self.count = 0
        self.seen.clear()
        if self.stage == "support":
            self._settle()
            return True
        self.basis_sweeps += 1
        settled = [accumulator.finish_pass(mean_over_ranks) for accumulator in self.hosvd.values()]
        all_settled = self._ranks.come_to("the bases of a sweep", ok=all(settled))
        if all_settled or (self.budget is not None and self.basis_sweeps == self._basis_sweeps_planned()):
            self._fill_in_bases()
            self.stage = "support"
            if not self.needs_support:
                self._settle()
        return self.done

    def _passes_in_sweep(self, budget: int) -> int:
        """Return the number of passes in the current sweep. Half of the budget is for the bases."""
        for_bases = budget // 2 if self.needs_support else budget
        if self.stage == "basis":
            return max(1, for_bases // self._basis_sweeps_planned())
        return max(1, budget - self.passes)

    def _basis_sweeps_planned(self) -> int:
        sketched = any(isinstance(accumulator, SketchedHosvd) for accumulator in self.hosvd.values())
        return 2 if sketched and self.budget is not None and self.budget >= 4 else 1

    def _accumulator(self, basis: Basis, device: torch.device) -> ExactHosvd | SketchedHosvd:
        if basis not in self.hosvd:
            self.hosvd[basis] = hosvd_accumulator(*basis.weight_shape, basis.ranks, device)
        return self.hosvd[basis]

    def _is_no_overflow(self, adapter: LayerAdapter, dy: torch.Tensor) -> bool:
        """Leave out a gradient with NaN or Inf, as loops skip its step; return False if a gradient scaler does that.

        Raises:
            ValueError: In an explicit warm-up, whose batches are all there is.
        """
        name = adapter.plan.name
        if dy.dtype == torch.float16:  # the loss scale is still being adjusted
            logger.warning("SparseGrad's warm-up leaves out a float16 gradient of %r that overflowed.", name)
            return False
        if self.budget is None:
            raise ValueError(
                f"SparseGrad's warm-up met NaN or Inf in the gradient of module {name!r}: check the batch and its "
                "labels, or lower the learning rate of what trains during the warm-up."
            )
        logger.warning("SparseGrad's warm-up leaves out a gradient of %r with NaN or Inf: check the batches.", name)
        return True

    def _check_observed(self, seen: set[LayerAdapter]) -> None:
        if not self.count:
            zeros = f"the gradient of {self.passed_over} batches was zero"
            found = zeros if self.passed_over else "it saw no gradient"
            raise ValueError(
                f"SparseGrad's warm-up has nothing to go by, {found}: the batches must run a forward and a backward "
                "pass through the adapted layers, with gradients enabled and the adapter active."
            )
        for basis, adapters in self.groups.items():
            names = [adapter.plan.name for adapter in adapters if adapter not in seen]
            if len(names) == len(adapters):
                self.hosvd.pop(basis, None)  # of zeros: the identity stays
            if names and self.stage == "support":
                logger.warning(
                    "SparseGrad's warm-up saw no gradient of %s, so their supports are data-free: if they are no part "
                    "of the loss, name them in `exclude_modules`.",
                    names,
                )

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
                adapter.settle(self.sums[adapter].support())
            else:
                adapter.settle()
            _copy_buffers_from_main(adapter)
            adapter.prepare()
            adapter.warmup = None
        self.stage = "done"
        forget(self)
        self.report = self._make_report()
        self.sums.clear()
        if self.budget is not None and is_main_process():
            logger.warning("SparseGrad's warm-up is done; training starts.\n%s", self.report)

    def _make_report(self) -> WarmUpReport:
        seconds = time.perf_counter() - self.started
        groups = [group_report(adapters, self.found.get(basis), self.sums) for basis, adapters in self.groups.items()]
        return WarmUpReport(self.adapter_name, self.passes, seconds, groups, self.passed_over)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.budget is not None and not self.done:
            watch(self)  # a copy warms up by itself


def _peak(tensor: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value as a float32 scalar, 0 for an expert's tensor without tokens."""
    return tensor.detach().abs().amax().float() if tensor.numel() else tensor.new_zeros((), dtype=torch.float32)


def _copy_buffers_from_main(module: torch.nn.Module) -> None:
    for buffer in module.buffers():
        copy_from_main(buffer)
