"""The base class of the layers of both methods on single parameters of a module."""

from __future__ import annotations

import torch
from torch import nn

from .adapted_parameters import AdaptedParameters
from .delta_layer import DeltaLayer


class ParameterLayer(DeltaLayer):
    """A tuner layer on one parameter, which `AdaptedParameters` asks for the sum and never calls.

    Attributes:
        parameter_name: Name of the parameter in its module.
    """

    is_linear = False
    has_rows = False
    parameter_name: str
    _holder: AdaptedParameters

    def be_held_by(self, holder: AdaptedParameters, parameter_name: str) -> None:
        """Take the place of a parameter among the layers of a module."""
        self.parameter_name = parameter_name
        object.__setattr__(self, "_holder", holder)  # a plain reference, because the holder has this layer as a child

    @property
    def base_layer(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The module that has the parameter."""
        return self._holder.base_layer

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, without deltas."""
        return self.base_layer.get_parameter(self.parameter_name)

    def adds_delta(self) -> bool:
        """Return whether an active adapter changes the parameter; first unmerge one that is disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return not self.disable_adapters and not self.merged and any(map(self.has_adapter, self.active_adapters))

    def adapted(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight`, the parameter as the forward pass finds it, plus every active adapter's delta."""
        raise NotImplementedError

    def get_base_weight(self) -> torch.Tensor:
        return self.parameter.data

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        self.parameter.data = weight_data

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.parameter.device, self.parameter.dtype

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
