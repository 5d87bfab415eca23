"""The conditions for computing a frozen layer and its delta in one operation, and for writing the weight out."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as torch_modules


def is_plain_linear(base_layer: nn.Module, x: torch.Tensor) -> bool:
    """Return whether a layer is a frozen `nn.Linear` without hooks or wrappers.

    `delta_linear` does not call the layer, so the layer may do nothing but multiply by its weight and add its
    bias.

    Args:
        base_layer: The layer.
        x: Input of the layer, shape (..., in).
    """
    if type(base_layer) is not nn.Linear or type(base_layer.weight) is not nn.Parameter:
        return False
    weight, bias = base_layer.weight, base_layer.bias
    if weight.device != x.device or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    hooks = (
        base_layer._forward_hooks,
        base_layer._forward_pre_hooks,
        base_layer._backward_hooks,
        base_layer._backward_pre_hooks,
    )
    is_hooked = any(hooks) or "forward" in vars(base_layer) or _has_global_hooks()
    return not is_hooked


def in_full_precision(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether the product of a weight and an input x is computed in float32 or float64."""
    is_full = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    return is_full and not torch.is_autocast_enabled(x.device.type)


def dtype_of_product(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer with this weight computes."""
    device_type = weight.device.type
    autocasts = torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64  # which it leaves alone
    return torch.get_autocast_dtype(device_type) if autocasts else weight.dtype


def _has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules, by the dictionaries that every release of torch has."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(torch_modules, f"_global_{kind}_hooks") for kind in kinds)
