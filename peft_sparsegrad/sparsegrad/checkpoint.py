"""Checks before saving and loading: if one of them fails, nothing is written and nothing is changed."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..common.files.adapter_file import check_tensors
from ..functional import file_dtype, is_selection
from .adapter import LayerAdapter
from .basis import Basis
from .layer import SparseGradLayer
from .stored_layer import check_layer, check_side, check_weight_shape, present_support

_IS_SIDE = re.compile(r"\.sparsegrad_basis\.(.+\.)?[UV]$")


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
    for start, module in modules.items():
        if isinstance(module, LayerAdapter):
            check_weight_shape(start, module.plan, given)
    check_tensors(expected, given)
    for start, module in modules.items():
        if isinstance(module, LayerAdapter):
            check_layer(start, module.plan, given)
        elif isinstance(module, Basis):
            for key in module.state_dict():
                check_side(f"{start}{key}", given[f"{start}{key}"], module.weight_shape)


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


def in_file_form(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors as files hold them.

    Each layer's values are in the order of their positions, and there are no slots. A basis is float16 if that loses
    nothing, as of every narrow one that a warm-up has found; that of a weighted merge is float32.
    """
    stored = {name: tensor for name, tensor in tensors.items() if not name.endswith(".slots")}
    for name in tensors.keys() - stored.keys():
        values = f"{name.removesuffix('slots')}values"
        slots = tensors[name].long().to(tensors[values].device)
        stored[values] = torch.empty_like(tensors[values]).index_copy_(0, slots, tensors[values])
    bases = {name: side for name, side in stored.items() if _IS_SIDE.search(name)}
    return {**stored, **{name: side.to(file_dtype(side)) for name, side in bases.items()}}


def in_layer_form(
    model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors as its layers hold them: what `in_file_form` has changed, and older forms.

    Raises:
        ValueError: If a support in an older form is damaged.
    """
    changed: dict[str, torch.Tensor] = {}
    for start, module in _own_modules(model, adapter_name, prefix).items():
        if isinstance(module, LayerAdapter):
            changed |= present_support(start, module.plan, tensors)
            if module.slots is not None and f"{start}slots" not in tensors:
                changed[f"{start}slots"] = torch.arange(len(module.slots), dtype=module.slots.dtype)
    bases = {name: side.float() for name, side in tensors.items() if _IS_SIDE.search(name) and not is_selection(side)}
    return {**tensors, **bases, **changed}


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
