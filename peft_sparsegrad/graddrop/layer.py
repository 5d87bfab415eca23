"""The GradDrop layers: frozen modules with trainable deltas whose gradients are masked in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from ..common.delta_layer import DeltaLayer, restore_float32
from ..common.placement import check_data_parallel, whole_shape
from ..common.training.backward import in_backward
from ..common.training.distributed import world_size
from ..common.training.optimizer_watcher import OptimizerStep, watch
from ..common.training.pieces import refuse_views
from ..functional import Delta
from .compiled_masks import masked, numbered
from .deltas import Deltas
from .mask_sampler import MaskSampler
from .masked_steps import MaskedParameter, before_masked_step
from .step_count import StepCount

_META = torch.device("meta")


class GradDropLayer(DeltaLayer, nn.Module):
    """A frozen module with the GradDrop adapters on it.

    Attributes:
        graddrop_adapter: [`Deltas`] by adapter name.
        graddrop_sampler: [`MaskSampler`] by adapter name, shared by all layers of the adapter.
        graddrop_name: Name of the module in the base model, on which its masks depend.
        graddrop_block: Name of the block, GradDrop's layer, that contains the module.
    """

    adapter_layer_names: tuple[str, ...] = ("graddrop_adapter",)
    other_param_names: tuple[str, ...] = ("graddrop_sampler", "first_gradients")

    def __init__(self, base_layer: nn.Module, name: str, block: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self._begin(name, block, backend, **kwargs)

    def _begin(self, name: str, block: str, backend: Any, **kwargs: Any) -> None:
        """Begin without an adapter, on a module whose quantisation, if any, PEFT's `backend` knows."""
        self.graddrop_adapter = nn.ModuleDict({})
        self.graddrop_sampler: dict[str, MaskSampler] = {}
        self.graddrop_name, self.graddrop_block = name, block
        self.quantization_backend = backend
        self.in_quantized_model = bool(kwargs.get("in_quantized_model")) or backend is not None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._number = numbered(self)
        self.first_gradients = {}
        watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = numbered(self)
        watch(self)  # a copy, or an unpickled layer, is watched like the original

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if any(name.startswith(f"{prefix}graddrop_adapter.") for name in state_dict):
            for sampler in self.graddrop_sampler.values():
                sampler.progress.values_replaced()

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.graddrop_adapter

    def is_frozen(self, adapter_name: str) -> bool:
        sampler = self.graddrop_sampler[adapter_name]
        return not sampler.trains(f"{self.graddrop_name}.weight", self.graddrop_block)

    def deltas(self, adapter_name: str) -> Deltas:
        """Return the deltas of an adapter on this module."""
        return cast(Deltas, self.graddrop_adapter[adapter_name])

    def update_layer(
        self, adapter_name: str, sampler: MaskSampler, init_weights: bool, inference_mode: bool = False
    ) -> None:
        """Add an adapter with a delta of the weight and, if there is one, of the bias."""
        self.graddrop_sampler[adapter_name] = sampler
        bias = self._base_bias()
        deltas = self.graddrop_adapter[adapter_name] = Deltas(
            self._new_delta(self.weight_shape, init_weights),
            None if bias is None else self._new_delta(whole_shape(bias), init_weights),
        )
        if not sampler.progress.is_shared:
            sampler.progress.share(StepCount(deltas._buffers, "num_steps"))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _base_bias(self) -> torch.Tensor | None:
        return getattr(self.get_base_layer(), "bias", None)

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the base weight, before any quantisation."""
        return whole_shape(self.get_base_layer().weight)  # pyright: ignore[reportArgumentType]

    def _new_delta(self, shape: Any, init_weights: bool) -> torch.Tensor:
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        return torch.zeros(shape, dtype=dtype) if init_weights else 0.1 * torch.randn(shape).to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device but not to its dtype, which would round deltas to bf16."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device not in (None, _META) and adapter_name in self.graddrop_adapter:
            deltas = self.deltas(adapter_name)
            if not deltas.weight_delta.is_meta:
                deltas.to(device)

    def train(self, mode: bool = True) -> GradDropLayer:
        """Set the mode of the module; in a quantised model, make deltas float32 again that were cast to bf16."""
        if mode and self.in_quantized_model:
            restore_float32(self.graddrop_adapter.parameters())
        return super().train(mode)

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Prepare the deltas for a step of an optimizer that holds them, as `before_masked_step` does."""
        return before_masked_step(self.masked_parameters(), step)

    def masked_parameters(self) -> Iterator[MaskedParameter]:
        """Yield every delta of this layer with everything that its mask depends on."""
        for kind in ("weight", "bias"):
            for adapter_name, sampler in self.graddrop_sampler.items():
                delta = self.deltas(adapter_name).of(kind)
                if delta is not None:
                    yield MaskedParameter(delta, sampler, f"{self.graddrop_name}.{kind}", self.graddrop_block)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return the delta of the weight times its scale, in the layout of the base weight and at least float32."""
        deltas = self.deltas(adapter_name)
        delta = deltas.weight_delta.detach()
        return _times(delta.to(torch.promote_types(delta.dtype, torch.float32)), deltas.scale)

    def get_delta_bias(self, adapter_name: str) -> torch.Tensor | None:
        delta = self.deltas(adapter_name).of("bias")
        return None if delta is None else _times(delta.detach(), self.deltas(adapter_name).scale)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def deltas_in_pass(self, kind: str, adapter_names: list[str]) -> list[Delta]:
        """Return what adapters add to the `"weight"` or to the `"bias"` in a forward pass that begins."""
        present = [(name, self.deltas(name)) for name in adapter_names if self.has_adapter(name)]
        values = [(name, deltas.of(kind), deltas.scale) for name, deltas in present]
        return [self._delta(name, kind, value, scale) for name, value, scale in values if value is not None]

    def mask_arriving_(self, gradient: torch.Tensor, adapter_name: str, kind: str) -> None:
        """Mask the contiguous gradient of a delta in place, as it arrives in a compiled backward pass."""
        name, sampler = f"{self.graddrop_name}.{kind}", self.graddrop_sampler[adapter_name]
        delta = self.deltas(adapter_name).of(kind)
        assert delta is not None
        refuse_views(delta, "mask its gradient", "another method")
        sampler.progress.begin_backward()
        sampler.progress.check_steps_are_seen(name, delta)
        sampler.mask_gradient_(gradient, name, self.graddrop_block)

    def _delta(self, adapter_name: str, kind: str, value: torch.Tensor, scale: float) -> Delta:
        if torch.compiler.is_compiling():  # the mask is drawn, and the steps are checked, when the gradient arrives
            return Delta(_times(masked(value, self._number, adapter_name, kind), scale), mask=None)
        name, sampler = f"{self.graddrop_name}.{kind}", self.graddrop_sampler[adapter_name]
        if value.requires_grad and (torch.is_grad_enabled() or self.training) and not in_backward():
            refuse_views(value, "mask its gradient", "another method")
            sampler.progress.begin_pass()
            sampler.progress.check_steps_are_seen(name, value)
        trains = sampler.trains(name, self.graddrop_block)
        zeros = not trains and (sampler.config.frozen == "gradient" or _needs_some_gradient(sampler))
        # With `x` detached, autograd need not reach this layer; bitsandbytes would take that for inference.
        attached = trains or zeros or self.in_quantized_model
        return Delta(
            _times(value if attached else value.detach(), scale),
            mask=lambda gradient: sampler.mask_gradient_(gradient, name, self.graddrop_block),
            trains=trains,
            zeros=zeros,
        )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the base layer with every active adapter's delta added to its weight and bias."""
        if "adapter_names" in kwargs:
            return self.mixed_forward(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self.active_adapters
        weight_deltas = self.deltas_in_pass("weight", active)
        if not weight_deltas:
            return cast(Callable[..., torch.Tensor], self.base_layer)(x, *args, **kwargs)
        self._check_is_here(weight_deltas[0].value, x)
        return self._forward_with(weight_deltas, self.deltas_in_pass("bias", active), x, *args, **kwargs)

    def rows_of(self, adapter_name, rows, result, x, *args, **kwargs):
        weight_deltas, bias_deltas = (self.deltas_in_pass(kind, [adapter_name]) for kind in ("weight", "bias"))
        self._check_is_here(weight_deltas[0].value, x)
        return self._rows_with(weight_deltas, bias_deltas, rows, result, x, *args, **kwargs)

    def _rows_with(
        self,
        weight_deltas: list[Delta],
        bias_deltas: list[Delta],
        rows: torch.Tensor,
        result: torch.Tensor,
        x: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return some rows of the output with deltas added, computed for all rows as their arguments are unknown."""
        return self._forward_with(weight_deltas, bias_deltas, x, *args, **kwargs)[rows]

    def _check_is_here(self, tensor: torch.Tensor, x: torch.Tensor) -> None:
        if tensor.is_meta and not x.is_meta:
            raise RuntimeError(
                f"what GradDrop needs of {self.graddrop_name!r} is on the meta device: load a saved adapter after "
                "`low_cpu_mem_usage`, offload linear layers before the adapter is added, and other modules not at all "
                "(name them in `exclude_modules`)"
            )

    def _forward_with(
        self, weight_deltas: list[Delta], bias_deltas: list[Delta], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        raise NotImplementedError

    def _replicate_for_data_parallel(self) -> GradDropLayer:
        check_data_parallel(self.graddrop_adapter)
        return super()._replicate_for_data_parallel()  # pyright: ignore[reportAttributeAccessIssue]

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "graddrop." + super().__repr__()


def _times(delta: torch.Tensor, scale: float) -> torch.Tensor:
    return delta if scale == 1 else delta * scale


def _needs_some_gradient(sampler: MaskSampler) -> bool:
    """Return whether a parameter that does not train must have a gradient of zeros rather than none.

    Data parallelism needs a gradient from every parameter, and a gradient scaler from at least one.
    """
    return world_size() > 1 or sampler.nothing_trains
