"""The collector behind every way of running the warm-up (SparseGrad, section 3.1).

It observes x and ∂L/∂y of every adapted layer in the backward pass, so no weight has to be unfrozen and a quantised
base warms up like any other. The passes are spent in sweeps: one for the basis of each group, or two where a sketch
takes the place of a Gram matrix, and then, for a static support, one for the sum of `G̃ = Vᵀ G U`, or of its squares,
from which each layer's entries are chosen. No batch is needed twice.

A pass is a forward pass, or several, and the backward pass after it, however often it goes through a layer. Sweeps end
between passes: a backward pass that computes its forward pass again must find the layers as they were.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from ...common.training.distributed import copy_buffers_from_main, is_main_process, refuse_join
from ...common.training.optimizer_watcher import OptimizerStep, forget, watch
from ...functional import ObservedGradient
from ..adapter import LayerAdapter
from ..basis import Basis
from .basis_search import BasisSearch
from .budget import announce_in_loop, budget_in_run
from .checks import check_any_gradient, is_no_overflow, warn_of_missing_bases, warn_of_missing_supports
from .clock import WarmUpClock
from .group_reports import group_reports
from .ranks import WarmUpRanks
from .report import WarmUpReport
from .support_sums import SupportSums

logger = logging.getLogger("peft_sparsegrad")


class WarmUpCollector:
    """Observer that collects the gradients of one adapter and settles its bases and supports.

    Args:
        adapter_name: Name of the adapter.
        adapters: The adapter on each of its layers.
        needs_basis: False if the bases are known already, from a file, from the weights, or as the identity.
        budget: Number of passes to observe in all.
        in_training: True if the passes are those of a training, which it is to be told of and may be too short for
            the budget; False if they are run for the warm-up.

    Attributes:
        passes: Number of passes with a gradient that was not zero, in the sweeps that have ended.
        passed_over: Number of passes without one, which say nothing about the task.
        report: The report once the warm-up is done, else None.
    """

    def __init__(
        self,
        adapter_name: str,
        adapters: list[LayerAdapter],
        needs_basis: bool,
        budget: int,
        in_training: bool = False,
    ) -> None:
        self.adapter_name, self.adapters = adapter_name, adapters
        self.budget, self.in_training = budget, in_training
        self.needs_support = not adapters[0].plan.dynamic
        self.groups: dict[Basis, list[LayerAdapter]] = {}
        for adapter in adapters:
            self.groups.setdefault(adapter.basis, []).append(adapter)
        self.stage = "basis" if needs_basis else "support"
        self.search = BasisSearch()
        self.sums: dict[LayerAdapter, SupportSums] = {}
        self.seen: set[LayerAdapter] = set()  # layers with a gradient in this sweep
        self._ranks = WarmUpRanks(adapters)
        self.count, self.passes, self.passed_over = 0, 0, 0
        self._observed = self._has_signal = False
        self.clock = WarmUpClock()
        self.report: WarmUpReport | None = None
        if in_training:
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
            self._announce()
        self._observed = True
        peaks = torch.stack([_peak(tensor) for tensor in gradient.tensors]).tolist()
        if not self._ranks.come_to(f"the gradient of {adapter.plan.name!r}", ok=all(map(math.isfinite, peaks))):
            return is_no_overflow(adapter.plan.name, of_loss, self.in_training)
        if all(peaks):
            self._has_signal = True
            self.seen.add(adapter)
        with self.clock.observing(of_loss.device):
            self._add(adapter, gradient)
        return True

    def _announce(self) -> None:
        if self.in_training and not self.passes_watched + self.passed_over and is_main_process():
            announce_in_loop(self.budget)

    def _add(self, adapter: LayerAdapter, gradient: ObservedGradient) -> None:
        if self.stage == "basis":
            self.search.add(adapter.basis, gradient)
            return
        if adapter not in self.sums:
            self.sums[adapter] = SupportSums(adapter, gradient.tensors[0].dtype)
        self.sums[adapter].update(gradient)

    def enter(self, adapter: LayerAdapter) -> None:
        """Note that a forward pass comes to a layer, and end the pass before it."""
        refuse_join("SparseGrad's warm-up")
        if not self.clock.runs:
            self.clock.start()
            self.budget = budget_in_run(self.budget) if self.in_training else self.budget
        self.begin_pass()
        self._ranks.entered.add(adapter)

    def begin_pass(self) -> None:
        """End the pass before this one, and a sweep that is complete with it; call it outside of backward passes."""
        if self._observed:
            self._end_pass()
            while not self.done and self.count >= self._passes_in_sweep():
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

    def end_sweep(self) -> None:
        """Go on to the supports, or end the warm-up, with the passes that there were; call it between passes.

        Raises:
            ValueError: If there was none with a gradient since the last call.
        """
        self._ranks.come_to("the end of a sweep")
        self._check_observed(self._ranks.on_any(self.seen))
        self.passes += self.count
        self.count = 0
        self.seen.clear()
        with self.clock.observing(self._ranks.device):
            if self.stage == "basis":
                self._end_basis_sweep()
            else:
                self._settle()
        if self.done:
            self._report()

    def _end_basis_sweep(self) -> None:
        self.search.end_sweep()
        if self.search.sweeps >= self.search.sweeps_planned(self.budget):
            self.search.fill_in()
            self.stage = "support"
            if not self.needs_support:
                self._settle()

    def _passes_in_sweep(self) -> int:
        """Return the number of passes in the current sweep. Half of the budget is for the bases."""
        for_bases = self.budget // 2 if self.needs_support else self.budget
        if self.stage == "basis":
            return max(1, for_bases // self.search.sweeps_planned(self.budget))
        return max(1, self.budget - self.passes)

    def _check_observed(self, seen: set[LayerAdapter]) -> None:
        check_any_gradient(self.count, self.passed_over)
        for basis, adapters in self.groups.items():
            names = [adapter.plan.name for adapter in adapters if adapter not in seen]
            if self.stage == "basis" and len(names) == len(adapters):
                self.search.sums.pop(basis, None)  # of zeros: the identity stays
                warn_of_missing_bases(names)
            elif self.stage == "support" and names:
                warn_of_missing_supports(names)

    def _settle(self) -> None:
        for adapter in self.adapters:
            if adapter in self.sums:
                self.sums[adapter].reduce()
                adapter.settle(self.sums[adapter].support() if self.sums[adapter].has_gradient else None)
            else:
                adapter.settle()
            copy_buffers_from_main(adapter)
            adapter.prepare()
            adapter.warmup = None
        self.stage = "done"
        forget(self)

    def _report(self) -> None:
        groups = group_reports(self.adapters, self.search.found, self.sums)
        self.sums.clear()
        self.report = WarmUpReport(
            adapter_name=self.adapter_name,
            passes=self.passes,
            seconds=self.clock.seconds(),
            groups=groups,
            passed_over=self.passed_over,
            steps_worth=self.clock.steps_worth(self.passes + self.passed_over),
        )
        for adapter in self.adapters:
            adapter.report = self.report
        if self.in_training and is_main_process():
            logger.warning(self.report.summary)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.in_training and not self.done:
            watch(self)  # a copy warms up by itself


def _peak(tensor: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value as a float32 scalar, 0 for an expert's tensor without tokens."""
    return tensor.detach().abs().amax().float() if tensor.numel() else tensor.new_zeros((), dtype=torch.float32)
