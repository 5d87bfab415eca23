"""The SparseGrad layer: a frozen linear layer and, in the basis of its group, a sparse core that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..common.delta_layer import DeltaLayer, restore_float32
from ..common.targeting import in_out_features
from ..functional import delta_product, delta_weight, hosvd_of_weight, materialised_linear, observe_gradient
from .materialise import adapter_to_materialise
from .plan import LayerPlan
from .renewal import watch
from .state import Support, TransitionMatrices
from .warmup_collector import WarmUp

# Called with (layer, x, dy), both (tokens, features), in the backward pass; returns whether it could use them.
Observer = Callable[["SparseGradLayer", torch.Tensor, torch.Tensor], bool]


class Adapter(NamedTuple):
    """What one adapter has on one layer."""

    plan: LayerPlan
    values: torch.Tensor
    support: Support
    group: TransitionMatrices


class SparseGradLayer(DeltaLayer):
    """State of the adapters of one layer.

    Attributes:
        sparsegrad_values: Adapter name to trained values, shape (k,); with a dynamic support (r_out * r_in,).
        sparsegrad_support: Adapter name to [`Support`].
        sparsegrad_basis: Adapter name to [`TransitionMatrices`], on the layer that owns them for its group only.
        sparsegrad_group: Adapter name to the [`TransitionMatrices`] in use, owned here or elsewhere.
        sparsegrad_plan: Adapter name to [`LayerPlan`].
        sparsegrad_warmup: Adapter name to the warm-up that watches its gradients until the support is settled.
        sparsegrad_probe: Adapter name to a measurement that watches them afterwards.
    """

    adapter_layer_names: tuple[str, ...] = ("sparsegrad_values",)
    other_param_names: tuple[str, ...] = (
        "sparsegrad_support",
        "sparsegrad_basis",
        "sparsegrad_group",
        "sparsegrad_plan",
        "sparsegrad_warmup",
        "sparsegrad_probe",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.sparsegrad_values = nn.ParameterDict({})
        self.sparsegrad_support = nn.ModuleDict({})
        self.sparsegrad_basis = nn.ModuleDict({})
        self.sparsegrad_group: dict[str, TransitionMatrices] = {}
        self.sparsegrad_plan: dict[str, LayerPlan] = {}
        self.sparsegrad_warmup: dict[str, WarmUp] = {}
        self.sparsegrad_probe: dict[str, Observer] = {}
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = in_out_features(self.get_base_layer())

    def adapter(self, name: str) -> Adapter:
        """The plan, the values, the support and the transition matrices of the adapter `name`."""
        support = cast(Support, self.sparsegrad_support[name])
        return Adapter(self.sparsegrad_plan[name], self.sparsegrad_values[name], support, self.sparsegrad_group[name])

    def update_layer(
        self, adapter_name: str, plan: LayerPlan, shared: TransitionMatrices | None, inference_mode: bool = False
    ) -> None:
        """Add an adapter. `shared` are the transition matrices of its group; None makes this layer their owner."""
        self.sparsegrad_plan[adapter_name] = plan
        group = shared or TransitionMatrices(self.out_features, self.in_features, plan.ranks)
        self.sparsegrad_group[adapter_name] = group
        if shared is None:
            self.sparsegrad_basis[adapter_name] = group
        regrows = plan.regrow_steps > 0 and not inference_mode
        support = Support(plan.core_shape, plan.k, plan.dynamic, settled=not plan.warmup_steps, regrows=regrows)
        self.sparsegrad_support[adapter_name] = support
        self.sparsegrad_values[adapter_name] = nn.Parameter(self._initial_values(plan))
        if plan.basis == "svd" and not inference_mode:
            weight = self.get_base_weight()
            found = hosvd_of_weight(weight.T if self.fan_in_fan_out else weight, plan.ranks)
            group.fill(found.U, found.V)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _initial_values(self, plan: LayerPlan) -> torch.Tensor:
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        size = plan.num_entries if plan.dynamic else plan.k
        return torch.zeros(size, dtype=dtype) if plan.init_weights else torch.randn(size).to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move to the base layer's device, and not to its dtype: bf16 would cost the bases their orthogonality."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if adapter_name not in self.sparsegrad_values or device is None or device.type == "meta":
            return
        if not self.sparsegrad_values[adapter_name].is_meta:
            self.sparsegrad_values[adapter_name] = self.sparsegrad_values[adapter_name].to(device)
        self.sparsegrad_support[adapter_name].to(device)
        if adapter_name in self.sparsegrad_basis:
            self.sparsegrad_basis[adapter_name].to(device)

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.sparsegrad_values

    def observer(self, adapter_name: str) -> Observer | None:
        """What watches the gradients of an adapter's layer in the next backward pass."""
        _, values, support, _ = self.adapter(adapter_name)
        observers: Mapping[str, Observer] = self.sparsegrad_probe if support.is_settled else self.sparsegrad_warmup
        return observers.get(adapter_name) if torch.is_grad_enabled() and values.requires_grad else None

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """`V S Uᵀ` in the layout of the base weight: (out, in), or (in, out) for Conv1D; at least float32."""
        plan, values, support, group = self.adapter(adapter_name)
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        U, V = group.on(values.device, values.dtype)
        delta = delta_weight(values, support.indices, U, V, plan.core_shape)
        return delta.T.contiguous() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class SparseGradLinear(nn.Module, SparseGradLayer):
    """SparseGrad on a `torch.nn.Linear`, a transformers `Conv1D`, or a quantised linear layer."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        plan: LayerPlan,
        shared: TransitionMatrices | None,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        SparseGradLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        watch(self)
        self.update_layer(adapter_name, plan, shared, inference_mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)  # a copy trains by itself

    def train(self, mode: bool = True) -> SparseGradLinear:
        """As usual; on a quantised base the values become float32 again, if bf16 took their place."""
        if mode and self.quantization_backend is not None:
            restore_float32(self.sparsegrad_values.values())
        return super().train(mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`base_layer(x)` plus every active adapter's delta; x (..., in), result (..., out)."""
        base_layer = cast(Callable[..., torch.Tensor], self.base_layer)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return base_layer(x, *args, **kwargs)
        sole = None if args or kwargs else adapter_to_materialise(self, x)
        if sole is not None:
            return self._materialised(sole, x)
        result = base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter_name in self.active_adapters:
            if adapter_name in self.sparsegrad_values:
                result = self._add_delta(adapter_name, result, x)
        return result

    def _materialised(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        plan, values, support, group = self.adapter(adapter_name)
        base_layer = cast(nn.Linear, self.base_layer)
        U, V = group.on(x.device, x.dtype)
        return materialised_linear(
            x, base_layer.weight, base_layer.bias, values, support.indices, U, V, plan.core_shape, plan.top_k,
            support.core_sum,
        )  # fmt: skip

    def _add_delta(self, adapter_name: str, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        plan, values, support, group = self.adapter(adapter_name)
        observer = self.observer(adapter_name)
        if observer is not None and not support.is_settled:  # the values are zero and stay so
            return _observe(self, result, x, values, observer, True)  # pyright: ignore[reportCallIssue]
        U, V = group.on(result.device, result.dtype)
        result = delta_product(
            result, x, values, support.indices, U, V, plan.core_shape, plan.top_k, core_sum=support.core_sum
        )
        if observer is None:
            return result
        return _observe(self, result, x, values, observer, False)  # pyright: ignore[reportCallIssue]

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "sparsegrad." + super().__repr__()


@torch.compiler.disable
def _observe(
    layer: SparseGradLayer,
    result: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    observer: Observer,
    blocks: bool,
) -> torch.Tensor:
    return observe_gradient(result, x, values, lambda x, dy: observer(layer, x, dy), blocks)


def sparsegrad_layers(model: nn.Module, adapter_name: str) -> list[SparseGradLayer]:
    """The layers of a model that carry the adapter, in the model's order."""
    return [
        module
        for module in model.modules()
        if isinstance(module, SparseGradLayer) and adapter_name in module.sparsegrad_values
    ]
