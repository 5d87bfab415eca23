"""Whether an adapter's warm-up has finished, for what is of no use before."""

from __future__ import annotations

import warnings

from .adapter import LayerAdapter
from .warmup.budget import fewer_passes
from .warmup.collector import WarmUpCollector


def check_settled(adapters: list[LayerAdapter], adapter_name: str) -> None:
    """Raise a ValueError if the warm-up has not finished, so that there is no basis and no support yet."""
    if not all(adapter.is_settled for adapter in adapters):
        raise ValueError(
            f"the warm-up of the adapter {adapter_name!r} has not finished: run `peft_sparsegrad.warmup` first, or "
            "train longer"
        )


def warn_if_saved_unsettled(adapters: list[LayerAdapter], adapter_name: str) -> None:
    """Warn that an adapter is saved before the end of its warm-up, as no file holds what that has collected so far."""
    _warn(adapters, f"{adapter_name!r} is saved after", "and begins the warm-up again when it is loaded to train")


def warn_if_merged_unsettled(adapters: list[LayerAdapter], adapter_name: str) -> None:
    """Warn that an adapter is merged before the end of its warm-up, which leaves the weights as they are."""
    _warn(adapters, f"{adapter_name!r} is merged after", "so that the weights stay as they are")


def _warn(adapters: list[LayerAdapter], event: str, consequence: str) -> None:
    waiting = [adapter for adapter in adapters if not adapter.is_settled]
    if not waiting:
        return
    warmup = waiting[0].warmup
    watched, budget = 0, waiting[0].plan.warmup_steps
    if isinstance(warmup, WarmUpCollector):
        watched, budget = warmup.passes_watched, warmup.budget
    warnings.warn(
        f"The adapter {event} {watched} of the {budget} passes of its warm-up, before any value of it has been "
        f"trained, {consequence}: for a run this short, {fewer_passes(budget)}run `peft_sparsegrad.warmup` or "
        "`SparseGradCallback` first.",
        stacklevel=3,
    )
