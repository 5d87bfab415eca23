"""GradDrop on parameters that a module uses as it likes, such as the fused weights of a mixture's experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..common.adapted_parameters import AdaptedParameters
from ..common.parameter_layer import ParameterLayer
from ..common.placement import whole_shape
from ..functional import masked_sum
from .layer import GradDropLayer


class GradDropParameter(ParameterLayer, GradDropLayer):
    """GradDrop on one parameter of a module, in the parameter's own shape.

    Args:
        holder: The module with adapted parameters.
        parameter_name: Name of the parameter in the module.
        name: Name of the parameter in the base model, on which its masks depend.
        block: Name of the block, GradDrop's layer, that contains it.
        kwargs: `in_quantized_model`.
    """

    def __init__(self, holder: AdaptedParameters, parameter_name: str, name: str, block: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.be_held_by(holder, parameter_name)
        self._begin(name, block, None, **kwargs)

    @property
    def weight_shape(self) -> torch.Size:
        return whole_shape(self.parameter)

    def _base_bias(self) -> None:
        return None

    def adapted(self, weight: torch.Tensor) -> torch.Tensor:
        deltas = self.deltas_in_pass("weight", self.active_adapters)
        self._check_is_here(deltas[0].value, weight)
        return masked_sum(weight, deltas)
