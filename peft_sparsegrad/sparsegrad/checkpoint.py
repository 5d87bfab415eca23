"""Checks before saving and loading: if one of them fails, nothing is written and nothing is changed."""

from __future__ import annotations

import re
import warnings

import torch
from torch import nn

from ..common.adapter_file import ADVICE, check_tensors
from ..functional import unpack_support
from .adapter import LayerAdapter
from .layer import SparseGradLayer
from .warmup_collector import WarmUpCollector


def check_settled(adapters: list[LayerAdapter], adapter_name: str) -> None:
    """Raise a ValueError in the middle of a warm-up, because no checkpoint holds the sums it has collected so far.

    An adapter that has not begun its warm-up can be saved, and begins the warm-up when it is loaded to train.
    """
    waiting = [adapter for adapter in adapters if not adapter.is_settled]
    if not waiting:
        return
    warmup = waiting[0].warmup
    if not isinstance(warmup, WarmUpCollector) or not warmup.passes_watched:
        warnings.warn(
            f"The adapter {adapter_name!r} is saved before its warm-up: it does nothing until it is trained.",
            stacklevel=2,
        )
        return
    raise ValueError(
        f"the adapter {adapter_name!r} cannot be saved before its warm-up has finished: it has watched "
        f"{warmup.passes_watched} of {waiting[0].plan.warmup_steps} backward passes. Train longer before saving "
        "(`save_steps` above `warmup_steps`), lower `warmup_steps`, or run `peft_sparsegrad.warmup` or "
        "`SparseGradCallback` first."
    )


def check_adapter_tensors(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], prefix: str
) -> None:
    """Check that the tensors of an adapter file fit the model.

    Args:
        model: The model, with the adapter injected.
        adapter_name: Name of the adapter.
        state_dict: Tensors of the file, under the names of the model's own tensors.
        prefix: Prefix that marks the names of this method.

    Raises:
        ValueError: If a tensor is missing, unknown, of another shape or dtype, or damaged. The message names it.
    """
    modules = _own_modules(model, adapter_name, prefix)
    expected = {start + key: tensor for start, each in modules.items() for key, tensor in each.state_dict().items()}
    given = {key: tensor for key, tensor in state_dict.items() if prefix in key}
    check_tensors(expected, given)
    for start, module in modules.items():
        if isinstance(module, LayerAdapter):
            _check_contents(start, module, given)


def check_complete(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Raise a ValueError if an adapter's tensors, taken from a user's state dict, are not all there.

    None at all is right on the ranks that do not write.

    Args:
        model: The model.
        adapter_name: The adapter.
        tensors: Tensors under the names of the model's own.
        prefix: Mark of the names of this method.
    """
    modules = _own_modules(model, adapter_name, prefix)
    expected = {_unwrapped(start + key) for start, each in modules.items() for key in each.state_dict()}
    missing = sorted(expected.difference(map(_unwrapped, tensors)))
    if tensors and missing:
        raise ValueError(
            f"`state_dict` lacks {len(missing)} of the {len(expected)} tensors of the adapter {adapter_name!r}, the "
            f"first is {missing[0]!r}: supports and bases are buffers. Leave `state_dict` out, or pass "
            "`model.state_dict()`."
        )


def _own_modules(model: nn.Module, adapter_name: str, prefix: str) -> dict[str, nn.Module]:
    """Return the modules that hold an adapter's tensors, by the beginning of the tensors' names."""
    modules = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseGradLayer):
            for part, held in (("adapter", layer.sparsegrad_adapter), ("basis", layer.sparsegrad_basis)):
                if adapter_name in held:
                    modules[f"{name}.{prefix}{part}.{adapter_name}.".removeprefix(".")] = held[adapter_name]
    return modules


def _unwrapped(name: str) -> str:
    """Return a tensor's name without the marks of wrappers, which are in some state dicts and not in others."""
    return re.sub(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)


def _check_contents(start: str, adapter: LayerAdapter, given: dict[str, torch.Tensor]) -> None:
    """Check the tensors of one layer, under names that begin with `start`, against its plan."""
    plan = adapter.plan
    shape = tuple(given[f"{start}weight_shape"].tolist())
    if shape != plan.weight_shape:
        raise ValueError(
            f"'{start}weight_shape': the adapter is for a weight of {shape}, not {plan.weight_shape}. {ADVICE}"
        )
    if int(given[f"{start}steps"]) < -1:
        raise ValueError(f"'{start}steps' must be at least -1, not {int(given[f'{start}steps'])}. {ADVICE}")
    if adapter.support is None:
        return
    try:
        unpack_support(given[f"{start}support"], plan.num_entries, plan.k)
    except ValueError as error:
        raise ValueError(f"'{start}support': {error}. {ADVICE}") from error
