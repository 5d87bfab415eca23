"""Repairs to bitsandbytes' 4-bit layers on the CPU.

In the first inference pass on a CPU with AVX512-BF16, bitsandbytes (0.50.2) repacks a 4-bit weight for its kernels.
Dequantising it then gives noise. `state_dict` undoes the packing but, unless the scales are quantised themselves, it
leaves them transposed, and everything that the layer computes afterwards is wrong.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def unpack_weight(layer: nn.Module) -> None:
    """Bring a 4-bit layer's weight into the layout that `dequantize` reads; leave any other layer alone."""
    if getattr(_quant_state(layer), "packing_format_for_cpu", False):
        layer.state_dict()
    restore_scales(layer)


def restore_scales(model: nn.Module) -> None:
    """Bring the scales of every unpacked 4-bit weight in a model back into their order."""
    for module in model.modules():
        state = _quant_state(module)
        if state is None or getattr(state, "packing_format_for_cpu", False) or state.absmax.ndim != 2:
            continue
        state.absmax = state.absmax.T.reshape(-1).float()


def _quant_state(layer: nn.Module) -> Any:
    return getattr(layer.__dict__.get("_parameters", {}).get("weight"), "quant_state", None)
