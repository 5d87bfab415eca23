"""Which modules of a model a configuration means, and what kind of layer they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D


def targeted_modules(
    model: nn.Module, config: Any, is_target: Callable[[Any, str], Any]
) -> Iterator[tuple[str, nn.Module]]:
    """Name and base layer of each module that `config` targets, in the model's order.

    Args:
        model: The model, with or without adapters of whatever method.
        config: A configuration with `target_modules`.
        is_target: A tuner's `_check_target_module_exists`, called with (config, name).
    """
    for name, base_layer in base_modules(model):
        if is_target(config, name):
            yield name, base_layer


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module but the root, adapted layers by what they adapt, and nothing that is inside of those."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    for name, module in model.named_modules():
        if name and not (inside and name.startswith(inside)):
            yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear(module: nn.Module, **backend_kwargs: Any) -> bool:
    """Whether the module is a Linear, a Conv1D or a quantised linear layer.

    Args:
        module: Any module.
        backend_kwargs: What PEFT's `get_quantization_kwargs(model)` returns.
    """
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(module, **backend_kwargs)
    return backend is not None and backend.layer_type == "linear"


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """Dimensions of a linear layer, in PEFT's order."""
    in_features, out_features = _get_in_out_features(module)
    if in_features is None or out_features is None:
        raise TypeError(f"cannot tell the dimensions of a {type(module).__name__}")
    return in_features, out_features
