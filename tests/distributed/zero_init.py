"""Add adapters to a model whose weights DeepSpeed's ZeRO-3 has split while it was made."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", DS_SKIP_CUDA_CHECK="1")

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from tiny import batch
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from peft_sparsegrad import GradDropConfig, SparseGradConfig

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # which would be compiled, with tools CI has not

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
METHODS = {
    "LoRA": lambda: LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False),
    "SparseGrad": lambda: SparseGradConfig(density=0.05, warmup_steps=0, init_weights=False),
    "a basis of the weights": lambda: SparseGradConfig(density=0.05, basis="svd", warmup_steps=0, init_weights=False),
    "GradDrop": lambda: GradDropConfig(init_weights=False),
}


def add(base: str, config: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM.from_pretrained(base, attn_implementation="eager"), config).eval()


def split(base: str, config: Any) -> Any:
    """The model as transformers makes it under a Trainer with ZeRO-3, with an adapter."""
    deepspeed.init_distributed(dist_backend="gloo")
    zero = HfDeepSpeedConfig(CONFIG)  # as long as it lives, `from_pretrained` splits what it makes
    model = add(base, config)
    assert zero.is_zero3()
    assert not model.get_base_model().model.embed_tokens.weight.numel()
    return model


def adapted(base: str, method: str) -> dict[str, Any]:
    """The adapter's tensors and the model's logits, in one piece and split."""
    found = {}
    for kind, make in {"one piece": add, "split": split}.items():
        model = make(base, METHODS[method]())
        tensors = {n: t for n, t in model.state_dict().items() if "sparsegrad_" in n or "graddrop_" in n}
        forward = model if kind == "one piece" else deepspeed.initialize(model=model, config=CONFIG)[0]
        with torch.no_grad():
            logits = forward(input_ids=batch()["input_ids"]).logits
        found[kind] = {"tensors": {name: tensor.clone() for name, tensor in tensors.items()}, "logits": logits}
    return found


def merged(base: str) -> list[str]:
    """The refusal of each of our methods to merge."""
    messages = []
    for method in ("SparseGrad", "GradDrop"):
        try:
            split(base, METHODS[method]()).merge_adapter()
        except RuntimeError as error:
            messages.append(str(error))
    return messages
