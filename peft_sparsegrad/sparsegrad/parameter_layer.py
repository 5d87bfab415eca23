"""SparseGrad on parameters that a module uses as it likes, such as the fused weights of a mixture's experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..common.adapted_parameters import AdaptedParameters
from ..common.parameter_layer import ParameterLayer
from ..common.placement import check_data_parallel
from ..functional import stacked_delta
from .basis import Basis
from .layer import SparseGradLayer
from .plan import LayerPlan


class SparseGradParameter(nn.Module, ParameterLayer, SparseGradLayer):
    """SparseGrad on a parameter (out, in) or (experts, out, in), where each expert has a core of its own.

    All experts of a group share its basis. "out" and "in" are the last two dimensions of the parameter, in whichever
    order its module uses them: the delta is right in either.
    """

    def __init__(
        self,
        holder: AdaptedParameters,
        parameter_name: str,
        adapter_name: str,
        plan: LayerPlan,
        basis: Basis | None,
        inference_mode: bool = False,
    ) -> None:
        super().__init__()
        self.be_held_by(holder, parameter_name)
        out_features, in_features = plan.weight_shape
        self._begin(in_features, out_features, None)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, plan, basis, inference_mode)

    def adapted(self, weight: torch.Tensor) -> torch.Tensor:
        for adapter in self._active_in_pass(weight):
            weight = adapter.add_to_weight(weight)
        return weight

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return `V S Uᵀ` of every expert in the shape of the parameter, at least float32."""
        adapter = self.adapter(adapter_name)
        dtype = torch.promote_types(adapter.values.dtype, torch.float32)
        delta = stacked_delta(adapter.core, adapter.plan.num_experts, dtype)
        return delta.detach().view(adapter.plan.parameter_shape)

    def _replicate_for_data_parallel(self) -> Any:
        check_data_parallel(self.sparsegrad_adapter)
        return super()._replicate_for_data_parallel()

    def __repr__(self) -> str:
        return "sparsegrad." + super().__repr__()
