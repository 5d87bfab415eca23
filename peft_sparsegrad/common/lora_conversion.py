"""The conversion of adapters of both methods to LoRA adapters, for servers that only support LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn

from .delta_layer import DeltaLayer
from .lora_factors import LoraFactors
from .output_change import OutputChange, measure_output_change
from .parameter_layer import ParameterLayer
from .targets.modules import exact_targets


@dataclass
class LoraConversion:
    """A LoRA adapter made of an adapter of another method.

    All modules have one rank, and one scale, `lora_alpha` / `r` = 1. Servers differ in what they make of anything
    else: llama.cpp divides `lora_alpha` by each tensor's own rank, vLLM by `r`, and both ignore PEFT's patterns.

    Attributes:
        config: Configuration of the LoRA adapter.
        state_dict: Tensors of the LoRA adapter, under the names that PEFT saves.
        errors: ‖ΔW − BA‖ / ‖ΔW‖ in the Frobenius norm, by module name; 1 for what was left out.
        output_change: Change of the model's output on a batch, if one was given.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    errors: dict[str, float]
    output_change: OutputChange | None = None

    @property
    def largest_error(self) -> float:
        return max(self.errors.values())

    @property
    def num_bytes(self) -> int:
        """Size of the tensors in the file that `save` writes."""
        return sum(tensor.nbytes for tensor in self.state_dict.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` to a directory."""
        os.makedirs(path, exist_ok=True)
        save_file(self.state_dict, os.path.join(path, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        self.config.save_pretrained(os.fspath(path))


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | None = None,
    adapter_name: str = "default",
    *,
    batch: Mapping[str, Any] | None = None,
    linear_only: bool = False,
) -> LoraConversion:
    """Convert a SparseGrad or GradDrop adapter to a LoRA adapter.

    SparseGrad's ΔW = V S Uᵀ has at most as many independent rows as S has rows, or columns, that hold a value. Without
    a `rank`, the LoRA adapter has the largest number that a module needs, its other factors are padded with zeros, and
    the conversion is exact. GradDrop's ΔW has a full rank and needs a `rank`.

    Args:
        model: A model with a trained adapter. It is not changed.
        rank: Rank of every module, by truncated SVD; None for an exact conversion.
        adapter_name: Name of the adapter.
        batch: Keyword arguments of a forward pass of the model, on its device, to measure the change of its output.
        linear_only: Leave out what a LoRA adapter cannot hold: experts (`target_parameters`), and trained biases,
            normalisation layers, convolutions and embeddings of GradDrop. Each has an error of 1.

    Returns:
        The LoRA adapter, for each module the relative error of its ΔW and, with a `batch`, what that does to the
        output.

    Raises:
        ValueError: If there is no such adapter, it is still in its warm-up, it trains what LoRA does not have, or no
            linear layer at all, the rank is below 1 or missing, or an adapter is merged while a batch is given.
        TypeError: If the batch is no dictionary.
    """
    layers = _layers(model, adapter_name)
    _check_arguments(rank, batch)
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        raise ValueError(
            "the adapter also trains `modules_to_save` or tokens, which the LoRA adapter would not have: use "
            "`model.merge_and_unload()` for a model with everything in it"
        )
    left_out = _without_a_place_in_lora(layers, adapter_name)
    _check_places(layers, adapter_name, {} if linear_only else left_out)
    factors = {name: each.lora_factors(adapter_name, rank) for name, each in layers.items() if each.is_linear}
    errors = {name: each.error for name, each in factors.items()} | dict.fromkeys(left_out, 1.0)
    change = None if batch is None else measure_output_change(model, layers, factors, adapter_name, batch)
    r = max(each.a.shape[0] for each in factors.values())
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": tensor
        for name, each in factors.items()
        for letter, tensor in zip("AB", each.padded(r), strict=True)
    }
    return LoraConversion(_lora_config(model, adapter_name, layers, factors, r), tensors, errors, change)


def _check_arguments(rank: Any, batch: Any) -> None:
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"`rank` must be a whole number of at least 1, not {rank!r}")
    if batch is not None and not isinstance(batch, Mapping):
        raise TypeError(
            f"`batch` must be one batch for `model(**batch)`, a dictionary of tensors, not a {type(batch).__name__}"
        )


def _layers(model: nn.Module, adapter_name: str) -> dict[str, DeltaLayer]:
    """Return the layers with the adapter, by their names in the base model."""
    named = _base(model).named_modules()
    adapted = {name: module for name, module in named if isinstance(module, DeltaLayer)}
    layers = {name: layer for name, layer in adapted.items() if layer.has_adapter(adapter_name)}
    if not layers:
        raise ValueError(f"the model has no SparseGrad or GradDrop adapter named {adapter_name!r}")
    return layers


def _base(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _without_a_place_in_lora(layers: dict[str, DeltaLayer], adapter_name: str) -> dict[str, DeltaLayer]:
    """Return the biases, and the modules and parameters that are not linear, that the adapter changes, by name."""
    changed = {}
    for name, layer in layers.items():
        bias = layer.get_delta_bias(adapter_name)
        if not layer.is_linear and bool(layer.get_delta_weight(adapter_name).any()):
            changed[name] = layer
        if bias is not None and bool(bias.any()):
            changed[f"{name}.bias"] = layer
    return changed


def _check_places(layers: dict[str, DeltaLayer], adapter_name: str, left_out: dict[str, DeltaLayer]) -> None:
    """Raise a ValueError if a LoRA adapter could hold nothing of the adapter, or if anything is left out."""
    if not any(layer.is_linear for layer in layers.values()):
        raise ValueError(
            f"the adapter {adapter_name!r} is on no linear layer, and a LoRA adapter cannot hold changes of experts "
            "(`target_parameters`) or of other modules: merge the adapter with `model.merge_and_unload()`"
        )
    experts = sum(isinstance(layer, ParameterLayer) for layer in left_out.values())
    others = len(left_out) - experts
    kinds = [f"{experts} weights of experts (`target_parameters`)"] if experts else []
    kinds += [f"{others} biases and modules that are not linear"] if others else []
    if kinds:
        raise ValueError(
            f"a LoRA adapter cannot hold the changes of {' and '.join(kinds)}, the first is {next(iter(left_out))!r}: "
            "merge the adapter, or leave them out with `linear_only=True` (`--linear-only`)"
        )


def _lora_config(
    model: nn.Module, adapter_name: str, layers: dict[str, DeltaLayer], factors: dict[str, LoraFactors], r: int
) -> LoraConfig:
    ours = cast("dict[str, PeftConfig]", model.peft_config)[adapter_name]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=exact_targets(_base(model), list(factors)),
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=True,
        fan_in_fan_out=any(layers[name].fan_in_fan_out for name in factors),
    )
