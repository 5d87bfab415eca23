"""The GradDrop tuner: injects the layers, gives them their masks, and saves what changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs
from torch import nn

from ..common.bitsandbytes_cpu import restore_scales
from ..common.delta_tuner import DeltaTuner
from ..common.files.model_card import collect_facts
from ..common.targets.language_tower import language_tower, warn_of_other_towers
from ..common.weighted_merge import WeightedMerge
from .blocks import block_of, find_blocks, selected_blocks
from .checkpoint import check_stored, compress, decompress
from .config import GradDropConfig
from .layer import GradDropLayer
from .mask_sampler import MaskSampler
from .parameter_layer import GradDropParameter
from .step_count import check_step_counts, is_step_count
from .targets import default_targets, layer_class
from .weighted_adapter import fill_adapter, merge_adapters


class GradDropModel(DeltaTuner):
    """PEFT tuner that trains the chosen weights of a model with randomly masked gradients.

    Method: O'Neill and Dutta, *Gradient Sparsification For Masked Fine-Tuning of Transformers* (arXiv 2307.10098).

    `get_peft_model` creates it. Its arguments are those of every PEFT tuner: the model, a [`GradDropConfig`], and the
    adapter's name.

    Example:

        >>> import peft_sparsegrad
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> base = AutoModelForSequenceClassification.from_pretrained("FacebookAI/xlm-roberta-large")
        >>> config = peft_sparsegrad.GradDropConfig.from_variant("Layer-GradDrop", task_type="SEQ_CLS")
        >>> model = get_peft_model(base, config)
    """

    prefix: str = "graddrop_"
    tuner_layer_cls = GradDropLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  the default depends on the model, not its type
    check_stored = staticmethod(check_stored)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Find the targets and their blocks, and refuse targets that cannot train, before anything is changed."""
        assert isinstance(peft_config, GradDropConfig)
        self._blocks = find_blocks(model)
        kwargs = get_quantization_kwargs(self.model)
        parameters = self._target_parameters(peft_config, model)
        if peft_config.target_modules is None:
            if parameters and peft_config.layers_to_transform is not None:
                peft_config.target_parameters = [target.name for target in parameters]
            tower = language_tower(model)
            blocks = [block for block in self._blocks if tower is None or block.startswith(f"{tower[0]}.")]
            selected, own = selected_blocks(blocks, peft_config), [target.name for target in parameters]
            targets: Any = default_targets(model, selected, own, **kwargs)
            if tower and len(blocks) < len(self._blocks):
                warn_of_other_towers("GradDrop", tower[0])
            peft_config.target_modules = targets
            peft_config.layers_to_transform = peft_config.layers_pattern = None  # they have had their effect
        targeted = self._targets(peft_config, model)
        for name, module in targeted:
            layer_class(name, module, **kwargs)
        names = [*(name for name, _ in targeted), *(target.name for target in parameters)]
        blocks = dict.fromkeys(self._block_of(name) for name in names)
        self._sampler = MaskSampler(peft_config, list(blocks))

    def _block_of(self, name: str) -> str:
        """Return the block that contains a module; a module outside of all blocks is a block of its own."""
        return block_of(name, self._blocks) or name

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
        assert isinstance(peft_config, GradDropConfig)
        layer = target
        if not isinstance(layer, GradDropLayer):
            layer = self._new_layer(target, target_name, parent, current_key, parameter_name)
            layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, self._sampler, peft_config.init_weights, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.deltas(adapter_name).requires_grad_(False)

    def _new_layer(
        self, target: nn.Module, target_name: str, parent: nn.Module, name: str, parameter_name: str | None
    ) -> GradDropLayer:
        """Put a layer without an adapter in the place of a module, or on a parameter of a module."""
        block, quantized = self._block_of(name), getattr(self.model, "is_quantized", False)
        if parameter_name is not None:
            holder = self._holder(parent, target_name, target)
            layer = GradDropParameter(holder, parameter_name, name, block, in_quantized_model=quantized)
            holder.add_module(parameter_name, layer)
            return layer
        kwargs = get_quantization_kwargs(self.model)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = layer_class(name, base, **kwargs)
        layer = kind(target, name, block, in_quantized_model=quantized, **kwargs)
        self._replace_module(parent, target_name, cast(nn.Module, layer), target)
        return layer

    def _weighted_merge(self, merge: WeightedMerge) -> tuple[PeftConfig, Callable[[str], None]]:
        config, deltas = merge_adapters(self.model, self.peft_config, merge)
        return config, partial(fill_adapter, self.model, deltas)

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
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        deltas = {name: tensor for name, tensor in tensors.items() if not is_step_count(name)}
        ours, trained = cast(GradDropConfig, config), sum(delta.numel() for delta in deltas.values())
        stored = {**tensors, **compress(deltas, ours)}
        ours.card_facts = collect_facts(model, adapter_name, config.task_type, trained, stored, state_dict)
        return stored

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_step_counts(remapped)
        return decompress(model, adapter_name, remapped)
