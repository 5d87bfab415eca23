"""The base class of the layers of both methods, whose adapters are mergeable deltas on a frozen weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from .bitsandbytes_cpu import unpack_weight
from .lora_factors import LoraFactors
from .mixed_batches import MixedBatchLayer
from .placement import check_merge
from .scaling import ScaledLayer, scales_of


class DeltaLayer(MixedBatchLayer, ScaledLayer):
    """A tuner layer whose adapters add `get_delta_weight` to the weight and `get_delta_bias` to the bias.

    Attributes:
        is_linear: True if the layer multiplies by its weight, so that a LoRA layer can take its place.
        fan_in_fan_out: True if the weight is stored as (in, out).
        first_gradients: Observer of the first backward pass by adapter name, only on the first layer of a model.
    """

    is_linear: ClassVar[bool] = False
    fan_in_fan_out: bool = False
    first_gradients: dict[str, Any]

    def is_frozen(self, adapter_name: str) -> bool:
        """Return whether the adapter is to stay as it is in this step, so that it may have no gradient."""
        return False

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's delta of the weight times its scale, in the layout of the base weight."""
        raise NotImplementedError

    def get_delta_bias(self, adapter_name: str) -> torch.Tensor | None:
        """Return the adapter's delta of the bias times its scale, or None if it leaves the bias as it is."""
        return None

    def lora_factors(self, adapter_name: str, rank: int | None) -> LoraFactors:
        """Return factors of the adapter's ΔW (out, in), exact ones if `rank` is None; only of a linear layer."""
        raise NotImplementedError

    def get_base_weight(self) -> torch.Tensor:
        """Return the base weight, dequantised if it is quantised."""
        unpack_weight(self.get_base_layer())
        return super().get_base_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight.

        Args:
            safe_merge: Merge into a copy first and refuse a result that is not finite.
            adapter_names: Names of the adapters; None for the active ones. Adapters already merged are skipped.

        Raises:
            ValueError: With `safe_merge`, if the merged weight is not finite.
            RuntimeError: If the base weight is split over devices.
        """
        check_merge(self.get_base_layer())
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if self.has_adapter(adapter_name):
                self._add_to_base(adapter_name, 1, safe_merge)
                self.merged_adapters.append(adapter_name)
                part = self.scaling.parts[adapter_name]
                part.merged_scale = part.scale

    def unmerge(self) -> None:
        """Subtract every merged adapter from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if self.has_adapter(adapter_name):
                part = self.scaling.parts[adapter_name]
                with scales_of({part: part.merged_scale}):  # `rescale_adapter_scale` may have ended since
                    self._add_to_base(adapter_name, -1, check=False)

    def _add_to_base(self, adapter_name: str, sign: int, check: bool) -> None:
        weight, delta_bias = self.get_base_weight(), self.get_delta_bias(adapter_name)
        merged = weight + sign * self.get_delta_weight(adapter_name).to(weight)
        bias = None
        if delta_bias is not None:
            base_bias = self.get_base_layer().bias
            bias = base_bias + sign * delta_bias.to(base_bias)  # pyright: ignore
        if check and not all(torch.isfinite(tensor).all() for tensor in (merged, bias) if tensor is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        self.set_base_weight(merged.contiguous())
        if bias is not None:
            self.get_base_layer().bias.data = bias.detach()  # pyright: ignore


def restore_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Cast the 16-bit parameters that train back to float32.

    TRL casts every trainable parameter of a quantised model to bf16, whose precision loses small updates.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
