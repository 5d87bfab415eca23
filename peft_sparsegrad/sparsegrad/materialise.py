"""When a layer adds its delta to the weight and not to the output: many tokens, full precision, nothing in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional import materialising_pays

if TYPE_CHECKING:
    from .layer import SparseGradLinear


def adapter_to_materialise(layer: SparseGradLinear, x: torch.Tensor) -> str | None:
    """The one adapter of a layer to be computed by `materialised_linear`, or None for `delta_product`.

    Both give the same up to the last digits. The frozen layer is then not called, so it must be nothing but a product
    with a weight.

    Args:
        layer: The layer, with its adapters enabled.
        x: Its input, shape (..., in).
    """
    active = [name for name in layer.active_adapters if layer.has_adapter(name)]
    if len(active) != 1 or layer.merged or not _is_plain(layer.base_layer, x):
        return None
    plan, _, support, _ = layer.adapter(active[0])
    if not support.is_settled or layer.observer(active[0]) is not None:
        return None
    tokens = x.numel() // layer.in_features
    return active[0] if materialising_pays(tokens, plan.weight_shape, plan.ranks) else None


def _is_plain(base_layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a module is a frozen `nn.Linear` in full precision which nobody has hooked or wrapped."""
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
    is_hooked = any(hooks) or "forward" in vars(base_layer) or _has_any_global_hook()
    return not is_hooked
