"""The change of a model's output when a LoRA adapter takes the place of the adapter that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .delta_layer import DeltaLayer
from .lora_factors import LoraFactors


@dataclass(frozen=True)
class OutputChange:
    """What a conversion does to the output on a batch.

    Attributes:
        relative: ‖y − y'‖ / ‖y − y₀‖, where y is the output (the logits, if there are any) with the adapter, y' with
            the LoRA adapter and y₀ without either: the share of the adapter's effect that is lost.
        loss_base: Loss without an adapter, or None if the batch has no labels.
        loss_adapter: Loss with the adapter, or None.
        loss_lora: Loss with the LoRA adapter, or None.
    """

    relative: float
    loss_base: float | None = None
    loss_adapter: float | None = None
    loss_lora: float | None = None


@torch.no_grad()
def measure_output_change(
    model: nn.Module,
    layers: Mapping[str, DeltaLayer],
    factors: Mapping[str, LoraFactors],
    adapter_name: str,
    batch: Mapping[str, Any],
) -> OutputChange:
    """Run the model three times on a batch, and leave it as it was.

    Args:
        model: The model, in any mode.
        layers: Layers with the adapter, by name.
        factors: Those of the LoRA adapter, by the names of their layers.
        adapter_name: Name of the adapter.
        batch: Keyword arguments of a forward pass.

    Raises:
        ValueError: If adapters are merged, since they cannot be left out then.
    """
    if any(layer.merged for layer in layers.values()):
        raise ValueError("`batch` needs the output without the adapter, which is merged: call `unmerge_adapter` first")
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with _only([], model):
            base, loss_base = _output(model, batch)
            with _factors_added(layers, factors):
                lora, loss_lora = _output(model, batch)
        with _only([adapter_name], model):
            ours, loss_adapter = _output(model, batch)
    finally:
        for module in was_training:
            module.training = True
    effect = (ours - base).norm().item()
    lost = (ours - lora).norm().item()
    return OutputChange(lost / effect if effect else 0.0, loss_base, loss_adapter, loss_lora)


def _output(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, float | None]:
    """Return the first output after the loss, float64, and the loss."""
    result = model(**batch)
    entries = dict(result) if isinstance(result, Mapping) else {"output": result}
    loss = entries.pop("loss", None)
    return next(iter(entries.values())).double(), None if loss is None else loss.item()


@contextmanager
def _only(adapter_names: list[str], model: nn.Module) -> Iterator[None]:
    """Inside, these adapters of the model are active and no others.

    The layers' own methods would change what requires a gradient.
    """
    layers = [module for module in model.modules() if isinstance(module, DeltaLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = adapter_names, not adapter_names
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def _factors_added(layers: Mapping[str, DeltaLayer], factors: Mapping[str, LoraFactors]) -> Iterator[None]:
    """Inside, each layer adds (x Aᵀ) Bᵀ to its output, as a LoRA layer with a scale of 1 does."""
    with ExitStack() as hooks:
        for name, (a, b, _) in factors.items():

            def add(_: nn.Module, inputs: Any, result: torch.Tensor, a=a, b=b) -> torch.Tensor:
                return result + (inputs[0].to(a) @ a.T @ b.T).to(result)

            hooks.enter_context(layers[name].register_forward_hook(add))  # pyright: ignore
        yield
