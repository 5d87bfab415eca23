"""The modules of a model that a configuration targets, and the kinds of layer that they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D


def targeted_modules(
    model: nn.Module, config: Any, is_target: Callable[[Any, str], Any]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and base layer of each module that `config` targets, in the model's order.

    Args:
        model: The model, with or without adapters of any method.
        config: A configuration with `target_modules`.
        is_target: A tuner's `_check_target_module_exists`, called with (config, name).
    """
    for name, base_layer in base_modules(model):
        if is_target(config, name):
            yield name, base_layer


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module but the root; an adapted layer is replaced by its base layer, and its parts are left out."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    for name, module in model.named_modules():
        if name and not (inside and name.startswith(inside)):
            yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def exact_targets(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """Return `target_modules` for the modules with these names in `model`, and for no other.

    PEFT compares a list with the ends of names. Where those could match other modules, it is a regular expression.
    """
    suffixes = tuple(f".{name}" for name in names)
    ambiguous = any(name.endswith(suffixes) and name not in names for name, _ in model.named_modules())
    return "|".join(map(re.escape, names)) if ambiguous else list(names)


def is_linear(module: nn.Module, **backend_kwargs: Any) -> bool:
    """Return whether the module is a Linear, a Conv1D or a quantised linear layer.

    Args:
        module: Any module.
        backend_kwargs: Result of PEFT's `get_quantization_kwargs(model)`.
    """
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(module, **backend_kwargs)
    return backend is not None and backend.layer_type == "linear"


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output features of a linear layer, in PEFT's order (in, out)."""
    in_features, out_features = _get_in_out_features(module)
    if in_features is None or out_features is None:
        raise TypeError(f"cannot tell the dimensions of a {type(module).__name__}")
    return in_features, out_features


def role_of(name: str) -> str:
    """Return the name of a module with its numbers replaced by `*`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
