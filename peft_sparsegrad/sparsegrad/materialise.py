"""The condition for adding a delta to the weight and not to the output: a plain linear layer in full precision."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as torch_modules


def is_plain_linear(base_layer: nn.Module, x: torch.Tensor) -> bool:
    """Return whether a layer is a frozen `nn.Linear` in full precision without hooks or wrappers.

    `materialised_linear` does not call the layer, so the layer may do nothing but multiply by its weight and add its
    bias.

    Args:
        base_layer: The layer.
        x: Input of the layer, shape (..., in).
    """
    if type(base_layer) is not nn.Linear or type(base_layer.weight) is not nn.Parameter:
        return False
    full_precision = x.dtype == base_layer.weight.dtype and x.dtype in (torch.float32, torch.float64)
    if not full_precision or torch.is_autocast_enabled(x.device.type):
        return False
    if base_layer.weight.device != x.device or any(parameter.requires_grad for parameter in base_layer.parameters()):
        return False
    hooks = (
        base_layer._forward_hooks,
        base_layer._forward_pre_hooks,
        base_layer._backward_hooks,
        base_layer._backward_pre_hooks,
    )
    is_hooked = any(hooks) or "forward" in vars(base_layer) or _has_global_hooks()
    return not is_hooked


def _has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules, by the dictionaries that every release of torch has."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(torch_modules, f"_global_{kind}_hooks") for kind in kinds)
