"""Models with two trained adapters, and the deltas of either."""

from __future__ import annotations

from dataclasses import replace

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_sparsegrad import GradDropConfig, SparseGradConfig, save_transition_matrices, warmup
from peft_sparsegrad.common.delta_layer import DeltaLayer

WEIGHTS = [0.7, -0.4]


def pair(kind: str, tmp_path, **settings) -> PeftModel:
    """A model with two trained adapters, "x" and "y"; those of `sparsegrad` share their bases."""
    torch.manual_seed(0)
    model = tiny.llama()
    if kind == "graddrop":
        configs = [GradDropConfig(**settings, init_weights=False) for _ in "xy"]
    elif kind == "lora":
        configs = [LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False) for _ in "xy"]
    else:
        configs = [SparseGradConfig(density=0.05, slack=3, warmup_steps=4, **settings) for _ in "xy"]
    model = get_peft_model(model, configs[0], adapter_name="x")
    if kind.startswith("sparsegrad"):
        warmup(model, [tiny.batch(seed) for seed in range(2)], adapter_name="x", progress=False)
        save_transition_matrices(model, tmp_path / "matrices.safetensors", "x")
        if kind == "sparsegrad":
            configs[1] = replace(configs[1], transition_matrices=str(tmp_path / "matrices.safetensors"))
    model.add_adapter("y", configs[1])
    model.set_adapter("y")
    if kind == "sparsegrad, other bases":
        warmup(model, [tiny.batch(seed) for seed in range(7, 9)], adapter_name="y", progress=False)
    for number, layer in enumerate(sparsegrad_layers(model)):
        for name in "xy":
            torch.nn.init.normal_(layer.adapter(name).values, std=0.1)
        if kind == "sparsegrad":  # supports of their own, as renewals give
            adapter = layer.adapter("y")
            generator = torch.Generator().manual_seed(number)
            adapter.place(torch.randperm(adapter.plan.num_entries, generator=generator)[: adapter.plan.k])
    return model


def sparsegrad_layers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "sparsegrad_adapter")]


def layers(model) -> dict[str, DeltaLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DeltaLayer)}


def deltas(model, adapter_name: str) -> dict[str, torch.Tensor]:
    """Weight and bias deltas in float64, by module; only of the layers that have the adapter."""
    found = {}
    for name, layer in layers(model).items():
        if layer.has_adapter(adapter_name):
            found[name] = layer.get_delta_weight(adapter_name).double()
            if (bias := layer.get_delta_bias(adapter_name)) is not None:
                found[f"{name}.bias"] = bias.double()
    return found
