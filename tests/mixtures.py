"""Tiny mixtures of experts, whose weights transformers keeps in one parameter for all experts of a layer."""

from __future__ import annotations

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}


def mixtral(implementation: str = "eager", **settings) -> PreTrainedModel:
    """Experts (experts, out, in)."""
    sizes = {**_SIZES, "intermediate_size": 24, "num_local_experts": 4, **settings}
    return _made(MixtralForCausalLM, MixtralConfig(**sizes), implementation)


def qwen3_moe(implementation: str = "eager", **settings) -> PreTrainedModel:
    """Experts (experts, out, in), narrower than the model."""
    sizes = {**_SIZES, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4, **settings}
    return _made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes), implementation)


def gpt_oss(implementation: str = "eager", **settings) -> PreTrainedModel:
    """Experts (experts, in, out), with biases."""
    sizes = {**_SIZES, "intermediate_size": 24, "num_local_experts": 4, **settings}
    return _made(GptOssForCausalLM, GptOssConfig(layer_types=["full_attention"] * 2, **sizes), implementation)


def ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(3, 64, (rows, 12), generator=torch.Generator().manual_seed(0))


def loss(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=ids(), labels=ids()).loss


def train(model: torch.nn.Module, steps: int = 3, lr: float = 0.02) -> list[float]:
    """Train what trains with AdamW on one batch; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def _made(kind, config, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = kind(config)
    model.set_experts_implementation(implementation)
    return model
