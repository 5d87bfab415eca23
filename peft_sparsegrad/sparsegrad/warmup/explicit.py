"""The explicit warm-up, which is run before training and returns a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...common.placement import check_weights_are_on_all_ranks
from ...common.training.distributed import agree, is_main_process
from ...common.training.zero import is_managed
from ..adapter import LayerAdapter
from ..config import SparseGradConfig
from ..layer import WAY_TO_TRAIN, adapted_layers, find_adapter
from .collector import WarmUpCollector
from .passes import Batches, warmup_passes
from .ranks import WAY_OUT
from .report import WarmUpReport


def warmup(
    model: nn.Module,
    batches: Batches,
    steps: int | None = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> WarmUpReport:
    """Find the transition matrices and the supports of a SparseGrad adapter (paper, section 3.1).

    The gradients of `steps` batches are observed, in one backward pass each: those of the first half for the bases,
    the others for the supports. Nothing is trained, and the model's mode (train or eval) is left as it is. Under
    `torch.distributed` every rank passes batches of its own, and all ranks end with identical bases and supports.

    Args:
        model: A model with a SparseGrad adapter that has not been trained yet.
        batches: Batches for `model(**batch).loss`, of which those whose labels are all -100 are passed over; or, for
            any other loss, a callable without arguments that runs one forward and one backward pass.
        steps: Number of backward passes, at least 2; None for the configuration's `warmup_steps`, or for one of each
            batch if there are fewer.
        adapter_name: Name of the adapter; None for the active one.
        progress: True to show a progress bar on rank 0.

    Returns:
        A report with the cost and, for each group, spectrum, rank and gradient energy captured.

    Raises:
        TypeError: If `model` is no module, `steps` no number, or a batch no dictionary of tensors.
        ValueError: If there is nothing to warm up, rank 0 alone has the weights, or the batches are too few, have no
            loss, have gradients that are all zero, or give NaN or Inf. The adapter is then unchanged. What is
            wrong on one rank is raised on all.
        RuntimeError: If the ranks do not run the same layers in the same number of passes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a model with a SparseGrad adapter, not a {type(model).__name__}")
    adapter_name, adapters = _adapters_to_warm_up(model, adapter_name)
    check_weights_are_on_all_ranks(model, "the warm-up", "run it after `accelerator.prepare(model, optimizer)`")
    _check_is_engine(model, adapters)
    plan = adapters[0].plan
    device = adapters[0].values.device
    default_steps = plan.warmup_steps or SparseGradConfig.warmup_steps
    passes, without_labels = warmup_passes(model, batches, steps, default_steps, device)
    collector = WarmUpCollector(adapter_name, adapters, needs_basis=plan.basis_needs_data, budget=len(passes))
    with _watching(adapters, collector), _gradients_kept_aside(model):
        _observe(passes, collector, progress and is_main_process())
    assert collector.report is not None
    collector.report.passed_over += without_labels
    return collector.report


def warmup_report(model: nn.Module, adapter_name: str | None = None) -> WarmUpReport | None:
    """Return the report of the warm-up that an adapter has had in this process, whichever way it was run.

    Args:
        model: A model with a SparseGrad adapter.
        adapter_name: Name of the adapter; None for the active one.

    Returns:
        The report; None before the end of the warm-up, and for an adapter from a file.

    Raises:
        ValueError: If there is no such adapter.
    """
    return find_adapter(model, adapter_name)[1][0].report


def _observe(passes: list[Callable[[], Any]], collector: WarmUpCollector, progress: bool) -> None:
    """Run each pass once, and some again in place of those without a gradient."""
    with tqdm(total=collector.budget, desc="warm-up", disable=not progress) as bar:
        while not collector.done:
            before = collector.passes_watched
            for run_pass in passes:
                with torch.enable_grad():
                    run_pass()
                collector.begin_pass()
                bar.update(collector.passes_watched - bar.n)
                if collector.done:
                    return
            if collector.passes_watched == before:
                collector.end_sweep()  # no pass has a gradient


def _check_is_engine(model: nn.Module, adapters: list[LayerAdapter]) -> None:
    """Raise a ValueError if DeepSpeed has taken over the adapters and the passes would not go through its engine."""
    if is_managed(adapters[0].values) and type(model).__name__ != "DeepSpeedEngine":
        raise ValueError(
            "DeepSpeed has taken over the parameters: pass its engine to `warmup`, run it before "
            "`deepspeed.initialize`, or leave it out, so that the first steps of training are observed"
        )


def _adapters_to_warm_up(model: nn.Module, adapter_name: str | None) -> tuple[str, list[LayerAdapter]]:
    name, adapters = find_adapter(model, adapter_name)
    layers = adapted_layers(model)
    plan = adapters[0].plan
    if not plan.basis_needs_data and plan.dynamic:
        raise ValueError(f"there is nothing to warm up: basis={plan.basis!r} with support='dynamic' needs no data")
    if any(layer.merged for layer in layers):
        raise ValueError("the model is merged: call `unmerge_adapter` before the warm-up")
    if name not in layers[0].active_adapters or not adapters[0].values.requires_grad:
        raise ValueError(f"the adapter {name!r} does not train, as it has to for a warm-up: {WAY_TO_TRAIN}")
    trained = any(adapter.values.any() for adapter in adapters)
    if not agree("the beginning of the warm-up", adapters[0].values.device, WAY_OUT, ok=not trained):
        raise ValueError(
            f"the adapter {name!r} has been trained: another basis or support would give its values, and the moments "
            "of an optimizer that has been built for them, to other entries. Add a new adapter and warm that up."
        )
    return name, adapters


@contextmanager
def _watching(adapters: list[LayerAdapter], collector: WarmUpCollector) -> Iterator[None]:
    """Let the collector observe the adapters inside the block, and undo its changes if it does not finish."""
    observers = [adapter.warmup for adapter in adapters]
    states = [(buffer, buffer.clone()) for each in adapters for buffer in (*each.buffers(), *each.basis.buffers())]
    for adapter in adapters:
        adapter.unsettle()
        adapter.warmup = collector
    try:
        yield
    finally:
        if not collector.done:
            for buffer, state in states:
                buffer.copy_(state)
            for adapter, observer in zip(adapters, observers, strict=True):
                adapter.warmup = observer


@contextmanager
def _gradients_kept_aside(model: nn.Module) -> Iterator[None]:
    """Set the parameters' gradients aside inside the block, so that the passes leave no gradient behind.

    DeepSpeed keeps gradients elsewhere, so there only the values have some, and those are zero.
    """
    kept = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.requires_grad]
    values = {adapter.values for adapter in model.modules() if isinstance(adapter, LayerAdapter)}
    for parameter, _ in kept:
        parameter.grad = None
        parameter.requires_grad_(parameter in values or not is_managed(parameter))
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.requires_grad_()
            parameter.grad = gradient
