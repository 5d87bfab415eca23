"""The explicit warm-up, which is run before training and returns a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..common.distributed import agree, is_main_process, numbers_of_ranks
from ..common.placement import check_weights_are_on_all_ranks
from ..common.zero import is_managed
from .adapter import LayerAdapter
from .layer import SparseGradLayer, layer_adapters
from .report import WarmUpReport
from .warmup_collector import WarmUpCollector
from .warmup_ranks import WAY_OUT

Batches = Iterable[Any] | Callable[[], Any]
DEFAULT_STEPS = 32


def warmup(
    model: nn.Module,
    batches: Batches,
    steps: int | None = None,
    adapter_name: str | None = None,
    progress: bool = True,
) -> WarmUpReport:
    """Find the transition matrices and the supports of a SparseGrad adapter (paper, section 3.1).

    The gradients of `steps` batches are observed in two or more sweeps over the same batches. Nothing is trained, and
    the model's mode (train or eval) is left as it is. Under `torch.distributed` every rank passes batches of its own,
    and all ranks end with identical bases and supports.

    Args:
        model: A model with a SparseGrad adapter that has not been trained yet.
        batches: Batches for `model(**batch).loss`, of which those whose labels are all -100 are passed over; or, for
            any other loss, a callable without arguments that runs one forward and one backward pass.
        steps: Number of batches to use; None for the configuration's `warmup_steps`, or for all if there are fewer.
        adapter_name: Name of the adapter; None for the active one.
        progress: True to show a progress bar on rank 0.

    Returns:
        A report with the duration and, for each group, spectrum, rank and gradient energy captured.

    Raises:
        ValueError: If there is nothing to warm up, rank 0 alone has the weights, or the batches are too few, have no
            loss, have gradients that are all zero, or give NaN or Inf. The adapter is then unchanged. What is
            wrong on one rank is raised on all.
        RuntimeError: If the ranks do not run the same layers in the same number of passes.
    """
    adapter_name, adapters = _adapters_to_warm_up(model, adapter_name)
    check_weights_are_on_all_ranks(model, "the warm-up", "run it after `accelerator.prepare(model, optimizer)`")
    _check_is_engine(model, adapters)
    plan = adapters[0].plan
    device = adapters[0].values.device
    passes, without_labels = _passes(model, batches, steps, plan.warmup_steps or DEFAULT_STEPS, device)
    collector = WarmUpCollector(adapter_name, adapters, needs_basis=plan.basis == "hosvd")
    collector.passed_over = without_labels
    with _watching(adapters, collector), _gradients_kept_aside(model):
        sweep = 0
        while not collector.done:
            sweep += 1
            bar = tqdm(passes, desc=f"warm-up, sweep {sweep}", disable=not (progress and is_main_process()))
            for run_pass in bar:
                with torch.enable_grad():
                    run_pass()
            collector.end_sweep()
    assert collector.report is not None
    return collector.report


def _check_is_engine(model: nn.Module, adapters: list[LayerAdapter]) -> None:
    """Raise a ValueError if DeepSpeed has taken over the adapters and the passes would not go through its engine."""
    if is_managed(adapters[0].values) and type(model).__name__ != "DeepSpeedEngine":
        raise ValueError(
            "DeepSpeed has taken over the parameters: pass its engine to `warmup`, run it before "
            "`deepspeed.initialize`, or leave it out, so that the first steps of training are observed"
        )


def _adapters_to_warm_up(model: nn.Module, adapter_name: str | None) -> tuple[str, list[LayerAdapter]]:
    layers = [module for module in model.modules() if isinstance(module, SparseGradLayer)]
    if not layers:
        raise ValueError(
            "the model has no SparseGrad adapter: call `get_peft_model(model, SparseGradConfig(...))` first"
        )
    name = adapter_name or layers[0].active_adapters[0]
    adapters = layer_adapters(model, name)
    if not adapters:
        raise ValueError(f"the model has no SparseGrad adapter named {name!r}")
    plan = adapters[0].plan
    if plan.basis != "hosvd" and plan.dynamic:
        raise ValueError(f"there is nothing to warm up: basis={plan.basis!r} with support='dynamic' needs no data")
    if any(layer.merged for layer in layers):
        raise ValueError("the model is merged: call `unmerge_adapter` before the warm-up")
    if name not in layers[0].active_adapters or not adapters[0].values.requires_grad:
        raise ValueError(f"the adapter {name!r} does not train: call `set_adapter({name!r})` before the warm-up")
    trained = any(adapter.values.any() for adapter in adapters)
    if not agree("the beginning of the warm-up", adapters[0].values.device, WAY_OUT, ok=not trained):
        raise ValueError(
            f"the adapter {name!r} has been trained: another basis or support would give its values, and the moments "
            "of an optimizer that has been built for them, to other entries. Add a new adapter and warm that up."
        )
    return name, adapters


def _passes(
    model: nn.Module, batches: Batches, steps: int | None, default_steps: int, device: torch.device
) -> tuple[list[Callable[[], Any]], int]:
    """Return one callable for each pass of a sweep, and the number of batches without labels that were passed over.

    The batches are kept, because there are several sweeps.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"`steps` must be at least 1, not {steps}")
    if callable(batches) and not isinstance(batches, Iterable):
        return [_until_dry(batches)] * (steps or default_steps), 0
    assert isinstance(batches, Iterable)
    kept, without_labels = [], 0
    for batch in batches:
        if has_labels(batch):
            kept.append(batch)
        else:
            without_labels += 1
        if len(kept) == (steps or default_steps):
            break
    counts = numbers_of_ranks(len(kept), device)
    if len(set(counts)) > 1:
        raise ValueError(
            f"the ranks have {counts} batches with labels for the warm-up: give every rank the same number of them"
        )
    if not kept or (steps is not None and len(kept) < steps):
        others = f", and {without_labels} more have no label but -100" if without_labels else ""
        raise ValueError(
            f"the batches ran dry after {len(kept)} of {steps or default_steps}{others}: pass more of them, or fewer "
            "`steps`"
        )
    passes = [lambda index=index, batch=batch: _backward(model, batch, index) for index, batch in enumerate(kept)]
    return passes, without_labels


def has_labels(batch: Any) -> bool:
    """Return whether a batch has labels other than -100, which losses leave out, or no field `labels` at all."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return not isinstance(labels, torch.Tensor) or labels.is_floating_point() or bool((labels != -100).any())


def _until_dry(run_pass: Callable[[], Any]) -> Callable[[], Any]:
    def checked() -> None:
        try:
            run_pass()
        except StopIteration as error:
            # On this rank alone: the others may be in a collective operation of the model's wrapper already, and end
            # when this process does.
            raise ValueError("the batches ran dry: the warm-up calls its callable twice or more per step") from error

    return checked


def _backward(model: nn.Module, batch: Any, index: int) -> None:
    device = next(model.parameters()).device
    on_device = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    finite_loss(batch_loss(model, on_device, index), index).backward()


def finite_loss(loss: torch.Tensor, index: int) -> torch.Tensor:
    """Return the loss of the warm-up's batch `index`.

    Raises:
        ValueError: If the loss is NaN or Inf on any rank.
    """
    if not agree(f"the loss of warm-up batch {index}", loss.device, WAY_OUT, ok=bool(torch.isfinite(loss))):
        elsewhere = ", and NaN or Inf on another rank" if torch.isfinite(loss) else ""
        raise ValueError(f"warm-up batch {index} gave a loss of {loss.item()}{elsewhere}: check its inputs and labels")
    return loss


def batch_loss(model: nn.Module, batch: dict[str, Any], index: int) -> torch.Tensor:
    """Return the loss that the model computes for the batch `index`.

    Raises:
        ValueError: If it computes none on any rank.
    """
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    device = next(model.parameters()).device
    if not agree(f"the output for warm-up batch {index}", device, WAY_OUT, ok=loss is not None):
        where = "" if loss is None else " on another rank"
        raise ValueError(
            f"warm-up batch {index} gave no loss{where}: put `labels` into the batch, it has {sorted(batch)}"
        )
    return loss  # pyright: ignore[reportReturnType]


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
