"""The parameters that `target_parameters` names, such as the fused weights of a mixture's experts."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapted_parameters import AdaptedParameters
from ..placement import whole_shape

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TargetedParameter(NamedTuple):
    """A parameter that is to have an adapter, in the model without adapters.

    Attributes:
        module_name: Name of the module that holds it.
        parameter_name: Its name in that module.
        module: The module.
    """

    module_name: str
    parameter_name: str
    module: nn.Module

    @property
    def name(self) -> str:
        """Name of the parameter in the model."""
        return f"{self.module_name}.{self.parameter_name}"

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter: (experts, out, in), or (out, in) of one weight."""
        return whole_shape(self.module.get_parameter(self.parameter_name))


def targeted_parameters(
    model: nn.Module, config: Any, is_target: Callable[[Any, str], Any]
) -> list[TargetedParameter]:
    """Return the parameters that `config.target_parameters` names, in the model's order.

    A name is that of a parameter or the end of it, as in PEFT. `exclude_modules` and `layers_to_transform` hold for
    parameters as they do for modules.

    Args:
        model: The model, with or without adapters of any method.
        config: A configuration with `target_parameters`.
        is_target: A tuner's `_check_target_module_exists`, called with (config, name).

    Raises:
        ValueError: If a name is that of no parameter, or of one that cannot have an adapter.
    """
    if not config.target_parameters:
        return []
    everything = list(_parameters(model))
    _check_names(config.target_parameters, [each.name for each in everything])
    as_modules = copy.copy(config)
    as_modules.target_modules = set(config.target_parameters)
    targets = [each for each in everything if is_target(as_modules, each.name)]
    if not targets:
        raise ValueError(
            f"`target_parameters={sorted(config.target_parameters)}` with `exclude_modules` and `layers_to_transform` "
            "leaves no parameter: change one of them"
        )
    for target in targets:
        _check_parameter(model, target)
        if is_target(config, target.module_name):
            raise ValueError(
                f"`target_modules` names {target.module_name!r}, and `target_parameters` its "
                f"{target.parameter_name!r}: leave one of the two out"
            )
    return targets


def _parameters(model: nn.Module) -> Iterator[TargetedParameter]:
    """Yield every parameter of a model but those of adapters and of the root."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer | AdaptedParameters):
            inside += (f"{name}.",)
            module = cast(nn.Module, module.base_layer)
        for parameter_name, _ in module.named_parameters(recurse=False):
            yield TargetedParameter(name, parameter_name, module)


def _check_names(wanted: list[str], names: list[str]) -> None:
    """Raise a ValueError, with similar names of as many parts, if no parameter's name is or ends in a wanted one."""
    for name in wanted:
        if not any(f".{each}".endswith(f".{name}") for each in names):
            parts = name.count(".") + 1
            endings = dict.fromkeys(".".join(each.split(".")[-parts:]) for each in names)
            near = difflib.get_close_matches(name, endings, n=3, cutoff=0.5)
            hint = f"similar ones are {', '.join(map(repr, near))}" if near else "see `model.named_parameters()`"
            raise ValueError(f"`target_parameters` names {name!r}, which is no parameter of the model: {hint}")


def _check_parameter(model: nn.Module, target: TargetedParameter) -> None:
    parameter = target.module.get_parameter(target.parameter_name)
    if isinstance(model.get_submodule(target.module_name), BaseTunerLayer):
        raise ValueError(
            f"`target_parameters` names {target.name!r}, whose module has an adapter already: unload that first, or "
            "name the module in `target_modules`"
        )
    if len(target.shape) not in (2, 3):
        raise ValueError(
            f"`target_parameters` names {target.name!r} of the shape {tuple(target.shape)}: adapters are for weights "
            "(out, in) and for stacks of them (experts, out, in)"
        )
    is_plain = hasattr(parameter, "full_tensor") or type(parameter.data) is torch.Tensor
    if parameter.dtype not in _DTYPES or not is_plain:
        raise ValueError(
            f"`target_parameters` names {target.name!r}, which is quantised ({parameter.dtype}), and adapters on "
            "quantised parameters are not supported: load the model dequantised, or leave the name out"
        )
