"""The modules that GradDrop can train, and those that it trains if no `target_modules` are given."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from ..common.targets.experts_left_out import expert_parameters, warn_of_experts_left_out
from ..common.targets.linear_layers import no_default
from ..common.targets.modules import base_modules, is_linear
from ..common.targets.unusual_layers import problem_of
from .blocks import block_of
from .layer import GradDropLayer
from .layer_kinds import GradDropConv2d, GradDropLinear, GradDropModule


def layer_class(name: str, module: nn.Module, **backend_kwargs: Any) -> type[GradDropLayer]:
    """Return the class of GradDrop layer for a module.

    Raises:
        TypeError: If GradDrop cannot train the module.
    """
    kind = _layer_class(module, **backend_kwargs)
    if kind is None:
        raise TypeError(
            f"the target module {name!r} is a {type(module).__name__}: GradDrop trains Linear, Conv1D, Conv2d, "
            "quantised linear, embedding and (Layer, RMS, group) normalisation layers. Change `target_modules` or set "
            "`exclude_modules`."
        )
    return kind


def default_targets(
    model: nn.Module, blocks: list[str], parameters: Collection[str], **backend_kwargs: Any
) -> set[str]:
    """Return the names of all modules inside the blocks that GradDrop can train, except embeddings.

    Args:
        model: The base model.
        blocks: Names of the blocks.
        parameters: Names of the parameters that train by themselves, and are not left out.
        backend_kwargs: Result of PEFT's `get_quantization_kwargs(model)`.

    Raises:
        ValueError: If there is no such module.
    """
    names = {
        name
        for name, module in base_modules(model)
        if block_of(name, blocks) is not None
        and not isinstance(module, nn.Embedding)
        and _layer_class(module, **backend_kwargs) is not None
        and problem_of(name, module, model) is None
    }
    if not names:
        reason = "GradDrop found no transformer blocks in this model whose layers it could train by default"
        raise no_default(reason, model)
    trained = names | set(parameters)
    if not parameters:
        warn_of_experts_left_out(model, trained, "GradDrop")
    _warn_of_what_is_left_out(model, blocks, trained)
    return names


def _warn_of_what_is_left_out(model: nn.Module, blocks: list[str], trained: set[str]) -> None:
    """Warn of parameters inside the blocks that stay frozen, except embeddings and fused experts."""
    inside = {name: parameter for name, parameter in model.named_parameters() if block_of(name, blocks) is not None}
    experts = expert_parameters(model)
    left_out = {
        name: parameter.numel()
        for name, parameter in inside.items()
        if name not in experts
        and block_of(name, trained) is None
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    }
    if left_out:
        share = sum(left_out.values()) / sum(parameter.numel() for parameter in inside.values())
        warnings.warn(
            f"{share:.1%} of the parameters inside the blocks are in modules that GradDrop cannot train, such as "
            f"{next(iter(left_out))!r}; they stay frozen.",
            stacklevel=2,
        )


def _layer_class(module: nn.Module, **backend_kwargs: Any) -> type[GradDropLayer] | None:
    if is_linear(module, **backend_kwargs):
        return GradDropLinear
    if isinstance(module, nn.Conv2d):
        return GradDropConv2d
    if isinstance(module, nn.Embedding) or _is_normalisation(module):
        return GradDropModule
    return None


def _is_normalisation(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer, by names, because transformers has many without a base."""
    names = {name for name, _ in module.named_parameters()}
    return type(module).__name__.endswith("Norm") and "weight" in names and names <= {"weight", "bias"}
