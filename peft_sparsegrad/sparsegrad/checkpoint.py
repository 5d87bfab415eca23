"""Checks on what is saved and what is loaded: nothing is written, and nothing changed, if one of them fails."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..common.adapter_file import ADVICE, check_tensors
from ..functional import unpack_support
from .layer import SparseGradLayer


def check_settled(layers: list[SparseGradLayer], adapter_name: str) -> None:
    """Raise a ValueError in the middle of a warm-up: what it has summed so far is in no checkpoint.

    An adapter that has not begun its warm-up loses nothing by being saved, and begins it when it is loaded to train.
    """
    waiting = [layer for layer in layers if not layer.adapter(adapter_name).support.is_settled]
    if not waiting:
        return
    steps = waiting[0].adapter(adapter_name).plan.warmup_steps
    warmup = waiting[0].sparsegrad_warmup.get(adapter_name)
    if warmup is None or not warmup.passes_watched:
        warnings.warn(
            f"The adapter {adapter_name!r} is saved before its warm-up: it does nothing until it is trained.",
            stacklevel=2,
        )
        return
    raise ValueError(
        f"the adapter {adapter_name!r} cannot be saved before its warm-up has finished: it has watched "
        f"{warmup.passes_watched} of {steps} backward passes. Train longer before saving (`save_steps` above "
        "`warmup_steps`), lower `warmup_steps`, or run `peft_sparsegrad.warmup` or `SparseGradCallback` first."
    )


def check_adapter_tensors(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], prefix: str
) -> None:
    """Hold the tensors of an adapter against the model that they are for.

    Args:
        model: The model, with the adapter injected.
        adapter_name: The adapter.
        state_dict: Tensors under the names of the model's own.
        prefix: What marks the names of this method.

    Raises:
        ValueError: Naming the tensor that is missing, unknown, of another shape or dtype, or damaged.
    """
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseGradLayer) and adapter_name in module.sparsegrad_values:
            expected.update(_tensors(name, module, adapter_name))
    given = {key: value for key, value in state_dict.items() if prefix in key}
    check_tensors({key: tensor for key, (tensor, _) in expected.items()}, given)
    for key, (_, layer) in expected.items():
        if key.endswith(".packed"):
            plan = layer.adapter(adapter_name).plan
            try:
                unpack_support(given[key], plan.num_entries, plan.k)
            except ValueError as error:
                raise ValueError(f"{key!r}: {error}. {ADVICE}") from error


def _tensors(name: str, layer: SparseGradLayer, adapter_name: str) -> dict:
    prefix = f"{name}." if name else ""
    tensors = {f"sparsegrad_values.{adapter_name}": layer.adapter(adapter_name).values}
    for attribute in ("sparsegrad_support", "sparsegrad_basis"):
        modules = getattr(layer, attribute)
        if adapter_name in modules:
            for buffer_name, buffer in modules[adapter_name].state_dict().items():
                tensors[f"{attribute}.{adapter_name}.{buffer_name}"] = buffer
    return {prefix + key: (tensor, layer) for key, tensor in tensors.items()}
