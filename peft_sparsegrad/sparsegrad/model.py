"""The SparseGrad tuner: injects the layers, shares their transition matrices and checks what is saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs
from torch import nn

from ..common.adapted_parameters import AdaptedParameters
from ..common.bitsandbytes_cpu import restore_scales
from ..common.delta_tuner import DeltaTuner
from ..common.files.model_card import collect_facts
from ..common.placement import check_weights_are_on_all_ranks, whole_shape
from ..common.targets.experts_left_out import named_like_experts, warn_of_experts_left_out
from ..common.weighted_merge import WeightedMerge
from .basis import Basis
from .checkpoint import check_adapter_tensors, check_complete, in_file_form, in_layer_form
from .config import SparseGradConfig
from .large_share import warn_of_large_share
from .layer import SparseGradLayer, SparseGradLinear, layer_adapters
from .parameter_layer import SparseGradParameter
from .plan import LayerPlan, plan_layer, plan_weight
from .settled import warn_if_merged_unsettled, warn_if_saved_unsettled
from .small_steps import SmallSteps
from .stored_layer import check_stored
from .targets import TARGET_MODULES, set_default_targets
from .transition_file import TransitionFile
from .warmup.collector import WarmUpCollector
from .weighted_adapter import fill_adapter, merge_adapters


class SparseGradModel(DeltaTuner):
    """PEFT tuner that trains a small share of a model's MLP weights in the basis of their gradients.

    Method: Chekalina et al., *SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers* (EMNLP 2024,
    2024.emnlp-main.831).

    `get_peft_model` creates it. Its arguments are those of every PEFT tuner: the model, a [`SparseGradConfig`], and
    the adapter's name.

    Example:

        >>> import peft_sparsegrad
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-chat-hf")
        >>> model = get_peft_model(base, peft_sparsegrad.SparseGradConfig(task_type="CAUSAL_LM"))
    """

    prefix: str = "sparsegrad_"
    tuner_layer_cls = SparseGradLayer
    target_module_mapping = TARGET_MODULES
    check_stored = staticmethod(check_stored)
    _has_default_targets = False  # of the adapter that is being added

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = cast(SparseGradConfig, self.peft_config[adapter_name])
        adapters = layer_adapters(model, adapter_name)
        if self._transition_file is not None:
            self._transition_file.apply(adapters)
        self._start_like_the_first(model, config, adapter_name)
        if adapters and not config.inference_mode:
            adapters[-1].small_steps = SmallSteps(adapter_name, adapters)
        waiting = [adapter for adapter in adapters if not adapter.is_settled]
        if waiting:
            needs_basis = waiting[0].plan.basis_needs_data and self._transition_file is None
            warmup = WarmUpCollector(adapter_name, waiting, needs_basis, config.warmup_steps, in_training=True)
            for adapter in waiting:
                adapter.warmup = warmup
        self._bases, self._transition_file = {}, None  # the file may be as large as the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base model returns; in a warm-up without a compiled graph, which would be in pieces."""
        if torch.compiler.is_compiling() and self._warms_up():
            return self._forward_uncompiled(*args, **kwargs)
        return super().forward(*args, **kwargs)

    @torch.compiler.disable
    def _forward_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def _warms_up(self) -> bool:
        """Return whether an active adapter is in its warm-up, the same for all of its layers.

        One that was loaded has left it, which its first pass with gradients notices.
        """
        notices = self.training or torch.is_grad_enabled()
        firsts = [adapter for name in self.active_adapters for adapter in layer_adapters(self.model, name)[:1]]
        return any(first.warmup is not None and (notices or not first.is_settled) for first in firsts)

    def _start_like_the_first(self, model: nn.Module, config: SparseGradConfig, adapter_name: str) -> None:
        """Start an adapter in the basis and with the supports of one that has the same configuration object.

        TRL makes the reference of a trained adapter like that, and then copies the parameters. The warm-up of an
        adapter that is to have bases of its own needs a configuration object of its own.
        """
        names = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        for first in names[:1]:
            pairs = list(zip(layer_adapters(model, adapter_name), layer_adapters(model, first), strict=True))
            if all(other.is_settled for _, other in pairs):
                for adapter, other in pairs:
                    adapter.copy_buffers(other)
                warnings.warn(
                    f"The adapter {adapter_name!r} has the configuration object of {first!r}, and starts in its bases "
                    "and with its supports: for a warm-up of its own, give it a copy of the configuration.",
                    stacklevel=2,
                )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        ours = cast(SparseGradConfig, peft_config)
        if ours.target_modules is None:
            set_default_targets(ours, self.model, model_config.get("model_type"))
            self._has_default_targets = True
        return ours

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Plan every layer, and read the transition matrices, before any layer is changed."""
        assert isinstance(peft_config, SparseGradConfig)
        self._bases: dict[tuple[Any, ...], Basis] = {}  # by group key
        self._transition_file: TransitionFile | None = None
        targets, parameters = self._targets(peft_config, model), self._target_parameters(peft_config, model)
        if peft_config.basis == "svd" and not peft_config.inference_mode:
            check_weights_are_on_all_ranks(model, "`basis='svd'`", "take another basis")
            _check_weights_are_loaded([*targets, *((target.name, target.module) for target in parameters)])
        plans = [self._plan(peft_config, name, module) for name, module in targets]
        plans += [plan_weight(peft_config, target.name, target.shape) for target in parameters]
        if not peft_config.inference_mode:
            warn_of_large_share(model, plans)
        names = [*(name for name, _ in targets), *(target.name for target in parameters)]
        if not (peft_config.inference_mode or peft_config.target_parameters) and (
            self._has_default_targets or named_like_experts(model, names)
        ):
            warn_of_experts_left_out(model, names, "SparseGrad")
        self._has_default_targets = False
        if peft_config.transition_matrices is not None and not peft_config.inference_mode:
            self._transition_file = TransitionFile.read(peft_config.transition_matrices)
            self._transition_file.check(plans)

    def _plan(self, config: SparseGradConfig, name: str, module: nn.Module) -> LayerPlan:
        return plan_layer(config, name, module, **get_quantization_kwargs(self.model))

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SparseGradConfig)
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is None:
            plan = self._plan(peft_config, current_key, base_layer)
        else:
            base_layer = base_layer.base_layer if isinstance(base_layer, AdaptedParameters) else base_layer
            plan = plan_weight(peft_config, current_key, whole_shape(base_layer.get_parameter(parameter_name)))
        basis = self._bases.get(plan.group_key)
        inference_mode = peft_config.inference_mode
        if isinstance(target, SparseGradLayer):
            layer = target
            layer.update_layer(adapter_name, plan, basis, inference_mode)
        elif parameter_name is not None:
            holder = self._holder(parent, target_name, target)
            layer = SparseGradParameter(holder, parameter_name, adapter_name, plan, basis, inference_mode)
            holder.add_module(parameter_name, layer)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
        else:
            kwargs = get_quantization_kwargs(self.model)
            layer = SparseGradLinear(target, adapter_name, plan, basis, inference_mode, **kwargs)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        self._bases[plan.group_key] = layer.adapter(adapter_name).basis

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters to the base weights, as in LoRA; None is for the active ones."""
        self._warn_of_unsettled(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._warn_of_unsettled(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _warn_of_unsettled(self, adapter_names: list[str] | None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            warn_if_merged_unsettled(layer_adapters(self.model, name), name)

    def _weighted_merge(self, merge: WeightedMerge) -> tuple[PeftConfig, Callable[[str], None]]:
        config, layers = merge_adapters(self.model, self.peft_config, merge)
        return config, partial(fill_adapter, self.model, layers)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        restore_scales(model)  # PEFT has just called `state_dict`, which disorders them
        warn_if_saved_unsettled(layer_adapters(model, adapter_name), adapter_name)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        check_complete(model, adapter_name, tensors, cls.prefix)
        tensors = in_file_form(tensors)
        trained = sum(adapter.values.numel() for adapter in layer_adapters(model, adapter_name))
        cast(SparseGradConfig, config).card_facts = collect_facts(
            model, adapter_name, config.task_type, trained, tensors, state_dict
        )
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        remapped = in_layer_form(model, adapter_name, remapped, cls.prefix)
        check_adapter_tensors(model, adapter_name, remapped, cls.prefix)
        return remapped


def _check_weights_are_loaded(targets: list[tuple[str, nn.Module]]) -> None:
    for name, module in targets:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"`basis='svd'` is computed from the weights, and that of {name!r} is on the meta device: load the "
                "model before the adapter is added, or take another basis"
            )
