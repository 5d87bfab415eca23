"""GradDrop's layer for each kind of module: linear layers, convolutions, and those that do more with a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..common.forward_replaced import Calling, forward_replaced
from ..common.lora_factors import LoraFactors
from ..common.placement import is_split_by_zero
from ..common.targets.modules import in_out_features
from ..functional import Conv2dOperation, Delta, masked_layer, masked_linear, masked_sum
from .layer import GradDropLayer
from .lora_factors import lora_factors


class _GradDropProduct(GradDropLayer):
    """A layer that multiplies its input by the weight, and does not keep weight + delta for the backward pass."""

    def product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        weight_deltas: list[Delta],
        bias_deltas: list[Delta],
    ) -> torch.Tensor:
        """Return the base layer's output with the deltas added; if `weight` is None, only the deltas' part of it."""
        raise NotImplementedError

    @property
    def keeps_base_apart(self) -> bool:
        """True if the deltas are applied apart from the base, which is quantised, offloaded or otherwise adapted."""
        base: Any = self.get_base_layer()
        return self.quantization_backend is not None or base is not self.base_layer or base.weight.is_meta

    def _forward_with(
        self, weight_deltas: list[Delta], bias_deltas: list[Delta], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.keeps_base_apart:
            result = cast(Callable[..., torch.Tensor], self.base_layer)(x, *args, **kwargs)
            return result + self.product(x.to(result.dtype), None, None, weight_deltas, bias_deltas)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base: Any = self.get_base_layer()
        if not is_split_by_zero(base):
            return self.product(x, base.weight, base.bias, weight_deltas, bias_deltas)
        return self._product_inside_hooks(x, weight_deltas, bias_deltas)  # pyright: ignore[reportCallIssue]

    @torch.compiler.disable
    def _product_inside_hooks(
        self, x: torch.Tensor, weight_deltas: list[Delta], bias_deltas: list[Delta]
    ) -> torch.Tensor:
        """Return the output where DeepSpeed's hooks on the layer bring its weight, for the backward pass too."""
        base: Any = self.get_base_layer()
        with forward_replaced(base, lambda _, x: self.product(x, base.weight, base.bias, weight_deltas, bias_deltas)):
            return base(x)

    @torch.compiler.disable
    def _rows_with(self, weight_deltas, bias_deltas, rows, result, x, *args, **kwargs):
        deltas = self.product(x[rows].to(result.dtype), None, None, weight_deltas, bias_deltas)
        return result[rows] + deltas


class GradDropLinear(_GradDropProduct):
    """GradDrop on a `torch.nn.Linear`, a transformers `Conv1D`, or a quantised linear layer."""

    is_linear = True

    def __init__(self, base_layer: nn.Module, name: str, block: str, **kwargs: Any) -> None:
        super().__init__(base_layer, name, block, **kwargs)
        self.in_features, self.out_features = in_out_features(self.get_base_layer())
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    @property
    def weight_shape(self) -> torch.Size:
        shape = (self.out_features, self.in_features)
        return torch.Size(shape[::-1] if self.fan_in_fan_out else shape)

    def product(self, x, weight, bias, weight_deltas, bias_deltas):
        return masked_linear(x, weight, bias, weight_deltas, bias_deltas, self.fan_in_fan_out)

    def lora_factors(self, adapter_name: str, rank: int | None) -> LoraFactors:
        if rank is None:
            raise ValueError(
                f"`rank` must be given to convert the GradDrop adapter {adapter_name!r}, whose changes are of full "
                "rank: a LoRA adapter is an approximation of it, rank=16 for instance"
            )
        delta = self.get_delta_weight(adapter_name)
        return lora_factors(delta.T if self.fan_in_fan_out else delta, rank)


class GradDropConv2d(_GradDropProduct):
    """GradDrop on a `torch.nn.Conv2d`, whose settings it shows because some models read them."""

    def __init__(self, base_layer: nn.Module, name: str, block: str, **kwargs: Any) -> None:
        super().__init__(base_layer, name, block, **kwargs)
        base = cast(nn.Conv2d, self.get_base_layer())
        self.kernel_size, self.stride, self.dilation = base.kernel_size, base.stride, base.dilation

    def product(self, x, weight, bias, weight_deltas, bias_deltas):
        base = cast(nn.Conv2d, self.get_base_layer())
        padding: Any = base.padding
        if base.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=mode), (0, 0)
        settings: Any = (base.stride, padding, base.dilation, base.groups)
        batched = x if x.ndim == 4 else x.unsqueeze(0)
        y = masked_layer(Conv2dOperation(*settings), batched, weight, bias, weight_deltas, bias_deltas)
        return y if x.ndim == 4 else y.squeeze(0)


class GradDropModule(GradDropLayer):
    """GradDrop on a module that does more with its weight than multiply: normalisation layers and embeddings."""

    def _forward_with(
        self, weight_deltas: list[Delta], bias_deltas: list[Delta], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        base: Any = self.get_base_layer()
        self._check_is_here(base.weight, x)
        if torch.compiler.is_compiling() and base is self.base_layer and not is_split_by_zero(base):
            parameters = _sums(base, "", weight_deltas, bias_deltas)
            return torch.func.functional_call(base, parameters, (x, *args), kwargs)
        return self._forward_inside_hooks(weight_deltas, bias_deltas, x, *args, **kwargs)  # pyright: ignore

    @torch.compiler.disable
    def _forward_inside_hooks(
        self, weight_deltas: list[Delta], bias_deltas: list[Delta], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the output where hooks on the base layer, or another adapter on it, have to run first."""
        base: Any = self.get_base_layer()

        def with_deltas(forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            parameters = _sums(base, "base.", weight_deltas, bias_deltas)
            return torch.func.functional_call(Calling(base, forward), parameters, args, kwargs)

        with forward_replaced(base, with_deltas):
            return cast(Callable[..., torch.Tensor], self.base_layer)(x, *args, **kwargs)


def _sums(base: Any, prefix: str, weight_deltas: list[Delta], bias_deltas: list[Delta]) -> dict[str, torch.Tensor]:
    """Return weight and bias of a module with the deltas added, by names that begin with `prefix`."""
    sums = {f"{prefix}weight": masked_sum(base.weight, weight_deltas)}
    if bias_deltas:
        sums[f"{prefix}bias"] = masked_sum(base.bias, bias_deltas)
    return sums
