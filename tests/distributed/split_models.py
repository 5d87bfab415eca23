"""Add adapters to models that are split over devices already."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import llama
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_sparsegrad import GradDropConfig, SparseGradConfig

CONFIGS = {
    "SparseGrad": lambda: SparseGradConfig(density=0.05, warmup_steps=0),
    "a basis of the weights": lambda: SparseGradConfig(density=0.05, basis="svd"),
    "GradDrop": GradDropConfig,
}


def fsdp1(use_orig_params: bool) -> Any:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(
        llama(), auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def fsdp2() -> Any:
    model = llama()
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def split(kind: str, base: str) -> Any:
    """The model, split over the ranks."""
    if kind.startswith("from_pretrained"):
        name = {"tensors": "tp_size", "FSDP": "fsdp_size", "pipeline": "pp_size"}[kind.partition(", ")[2]]
        return LlamaForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(**{name: 2}))
    return fsdp2() if kind == "FSDP2" else fsdp1(kind == "FSDP1, original parameters")


def refusal(model: Any, add: Any) -> str:
    try:
        add()
    except ValueError as error:
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        return str(error)
    return "not refused"


def refusals(kind: str, base: str, adapters: dict[str, str]) -> list[str]:
    """The messages of each method that is to be added, and of each saved adapter that is to be loaded."""
    model = split(kind, base)
    added = [refusal(model, lambda config=config: get_peft_model(model, config())) for config in CONFIGS.values()]
    return added + [
        refusal(model, lambda path=path: PeftModel.from_pretrained(model, path)) for path in adapters.values()
    ]


def merged_afterwards() -> list[str]:
    """The refusal of each method to merge into a model that FSDP2 has split."""
    messages = []
    for config in CONFIGS.values():
        model = get_peft_model(llama(), config())
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        try:
            model.merge_adapter()
        except RuntimeError as error:
            messages.append(str(error))
    return messages
