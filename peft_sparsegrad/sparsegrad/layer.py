"""The SparseGrad layer: a frozen linear layer and, in the basis of its group, a sparse core that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..common.delta_layer import DeltaLayer, restore_float32
from ..common.lora_factors import LoraFactors
from ..common.placement import check_data_parallel, in_one_piece
from ..common.targets.modules import in_out_features
from ..common.tracing import is_exporting
from ..functional import delta_linear, delta_weight, hosvd_of_weight, writing_out_pays
from .adapter import LayerAdapter
from .basis import Basis
from .lora_factors import lora_factors
from .plain_linear import dtype_of_product, in_full_precision, is_plain_linear
from .plan import LayerPlan
from .settled import check_settled

WAY_TO_TRAIN = (
    "load a saved adapter with `PeftModel.from_pretrained(base, path, is_trainable=True)`, and make one that is not "
    "active so with `set_adapter`"
)


class SparseGradLayer(DeltaLayer):
    """A frozen linear layer with the SparseGrad adapters on it.

    Attributes:
        sparsegrad_adapter: [`LayerAdapter`] by adapter name.
        sparsegrad_basis: [`Basis`] of the layer's group by adapter name, only on the layer that owns it.
    """

    is_linear = True
    adapter_layer_names: tuple[str, ...] = ("sparsegrad_adapter",)
    other_param_names: tuple[str, ...] = ("sparsegrad_basis", "first_gradients")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._begin(*in_out_features(self.get_base_layer()), backend)

    def _begin(self, in_features: int, out_features: int, backend: Any) -> None:
        """Begin without an adapter, on a weight whose quantisation, if any, PEFT's `backend` knows."""
        self.in_features, self.out_features, self.quantization_backend = in_features, out_features, backend
        self.sparsegrad_adapter = nn.ModuleDict({})
        self.sparsegrad_basis = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.first_gradients = {}

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.sparsegrad_adapter

    def adapter(self, adapter_name: str) -> LayerAdapter:
        """Return the part of the adapter that is on this layer."""
        return cast(LayerAdapter, self.sparsegrad_adapter[adapter_name])

    @property
    def adapters(self) -> list[LayerAdapter]:
        """Every adapter on this layer."""
        return cast("list[LayerAdapter]", list(self.sparsegrad_adapter.values()))

    def update_layer(
        self, adapter_name: str, plan: LayerPlan, basis: Basis | None, inference_mode: bool = False
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Name of the adapter.
            plan: Shapes and settings of the adapter on this layer.
            basis: Basis of the layer's group; None makes this layer the owner of a new one.
            inference_mode: True if the adapter's tensors come from a file and do not train.
        """
        if basis is None:
            basis = self.sparsegrad_basis[adapter_name] = Basis(plan.weight_shape, plan.ranks, plan.selects_columns)
        if plan.basis == "svd" and not inference_mode:
            with in_one_piece(self.get_base_layer()):
                weight = self.get_base_weight()
                found = hosvd_of_weight(weight.T if self.fan_in_fan_out else weight, plan.ranks)
            basis.choose(found.U, found.V)
        self.sparsegrad_adapter[adapter_name] = LayerAdapter(plan, self._initial_values(plan), basis)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        self.adapter(adapter_name).prepare()

    def _active_in_pass(self, given: torch.Tensor) -> list[LayerAdapter]:
        """Return the active adapters for a forward pass that begins with the tensor `given`."""
        active = [self.adapter(name) for name in self.active_adapters if self.has_adapter(name)]
        for adapter in active:
            self._begin_pass(adapter, given)
        return active

    def _begin_pass(self, adapter: LayerAdapter, given: torch.Tensor) -> None:
        if adapter.values.is_meta and not given.is_meta:
            raise RuntimeError(
                "the values of a SparseGrad adapter are on the meta device: load a saved adapter after "
                "`low_cpu_mem_usage`, and offload a model before the adapter is added"
            )
        adapter.begin_pass()

    def _initial_values(self, plan: LayerPlan) -> torch.Tensor:
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        size = plan.num_entries if plan.dynamic else plan.k
        return torch.zeros(size, dtype=dtype) if plan.init_weights else torch.randn(size).to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device but not to its dtype, as bf16 bases would not be orthogonal."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if adapter_name not in self.sparsegrad_adapter or device is None or device.type == "meta":
            return
        if self.adapter(adapter_name).values.is_meta:
            return
        self.adapter(adapter_name).to(device)
        if adapter_name in self.sparsegrad_basis:
            self.sparsegrad_basis[adapter_name].to(device)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return `V S Uᵀ` in the layout of the base weight: (out, in), or (in, out) for Conv1D; at least float32."""
        core = self.adapter(adapter_name).core
        dtype = torch.promote_types(core.values.dtype, torch.float32)
        delta = delta_weight(core._replace(values=core.values.detach().to(dtype)))
        return delta.T.contiguous() if self.fan_in_fan_out else delta

    def lora_factors(self, adapter_name: str, rank: int | None) -> LoraFactors:
        adapter = self.adapter(adapter_name)
        check_settled([adapter], adapter_name)
        return lora_factors(adapter, rank)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class SparseGradLinear(nn.Module, SparseGradLayer):
    """SparseGrad on a `torch.nn.Linear`, a transformers `Conv1D`, or a quantised linear layer.

    Attributes:
        writing_out_pays: Called with (tokens, weight shape, ranks, whether columns are chosen); returns whether to
            add the delta to the weight and not to the output, where that is possible. A benchmark replaces it to force
            one of the two.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        plan: LayerPlan,
        basis: Basis | None,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        SparseGradLayer.__init__(self, base_layer, **kwargs)
        self.writing_out_pays: Callable[..., bool] = writing_out_pays
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, plan, basis, inference_mode)

    def train(self, mode: bool = True) -> SparseGradLinear:
        """Set the mode of the layer; on a quantised base, make values float32 again that were cast to bf16."""
        if mode and self.quantization_backend is not None:
            restore_float32(adapter.values for adapter in self.adapters)
        return super().train(mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return `base_layer(x)` plus every active adapter's delta, for x (..., in); the result is (..., out)."""
        if "adapter_names" in kwargs:
            return self.mixed_forward(x, *args, **kwargs)
        base_layer = cast(Callable[..., torch.Tensor], self.base_layer)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return base_layer(x, *args, **kwargs)
        active = self._active_in_pass(x)
        if len(active) == 1 and not args and not kwargs and self._is_one_operation(active[0], x):
            linear = cast(nn.Linear, self.base_layer)
            core = active[0].core_in(dtype_of_product(linear.weight))
            return delta_linear(x, linear.weight, linear.bias, core, self._writes_out(active[0].plan, x))
        result = base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in active:
            result = adapter.add_delta(result, x)
        return result

    def rows_of(self, adapter_name, rows, result, x, *args, **kwargs):
        adapter = self.adapter(adapter_name)
        self._begin_pass(adapter, x)
        return adapter.add_delta(result[rows], x[rows])

    def _is_one_operation(self, adapter: LayerAdapter, x: torch.Tensor) -> bool:
        """Return whether the base layer and the adapter's delta are computed together for this input."""
        return adapter.observer is None and not adapter.skip_zeros and is_plain_linear(self.base_layer, x)

    def _writes_out(self, plan: LayerPlan, x: torch.Tensor) -> bool:
        """Return whether the adapter's delta is added to the weight for this input; an export is for any input."""
        if is_exporting() or not in_full_precision(cast(nn.Linear, self.base_layer).weight, x):
            return False
        tokens = x.numel() // self.in_features
        return self.writing_out_pays(tokens, plan.weight_shape, plan.ranks, plan.selects_columns)

    def _replicate_for_data_parallel(self) -> SparseGradLinear:
        check_data_parallel(self.sparsegrad_adapter)
        return super()._replicate_for_data_parallel()  # pyright: ignore[reportAttributeAccessIssue]

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "sparsegrad." + super().__repr__()


def layer_adapters(model: nn.Module, adapter_name: str) -> list[LayerAdapter]:
    """Return the adapter's part on each layer of a model, in the model's order."""
    layers = (module for module in model.modules() if isinstance(module, SparseGradLayer))
    return [layer.adapter(adapter_name) for layer in layers if layer.has_adapter(adapter_name)]


def adapted_layers(model: nn.Module) -> list[SparseGradLayer]:
    """Return the layers of a model with SparseGrad adapters; raises a ValueError if there are none."""
    layers: list[SparseGradLayer] = [module for module in model.modules() if isinstance(module, SparseGradLayer)]
    if not layers:
        raise ValueError(
            "the model has no SparseGrad adapter: call `get_peft_model(model, SparseGradConfig(...))` first"
        )
    return layers


def find_adapter(model: nn.Module, adapter_name: str | None = None) -> tuple[str, list[LayerAdapter]]:
    """Return the name of an adapter, that of the active one for None, and its part on each layer.

    Raises:
        ValueError: If the model has no such adapter. The message names those that there are.
    """
    layers = adapted_layers(model)
    name = adapter_name or layers[0].active_adapters[0]
    adapters = layer_adapters(model, name)
    if not adapters:
        known = dict.fromkeys(known for layer in layers for known in layer.sparsegrad_adapter)
        raise ValueError(f"the model has no SparseGrad adapter named {name!r}, only {', '.join(known)}")
    return name, adapters
