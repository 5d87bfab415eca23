"""Transformers models with random weights, and batches of random tokens, at the shapes that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """Size of a model and of its batch.

    Attributes:
        family: `"bert"` or `"llama"`.
        hidden: Model width.
        intermediate: Width of the MLP.
        layers: Transformer blocks.
        heads: Attention heads.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        vocabulary: Small, so that embeddings and output layer, which every method shares, stay cheap.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    batch: int
    length: int
    vocabulary: int = 1000


SHAPES: dict[str, dict[str, Shape]] = {
    "cpu": {
        "bert": Shape("bert", hidden=768, intermediate=3072, layers=4, heads=12, batch=8, length=128),
        "llama": Shape("llama", hidden=1024, intermediate=2752, layers=2, heads=16, batch=4, length=128),
    },
    "cuda": {
        "bert": Shape("bert", hidden=768, intermediate=3072, layers=12, heads=12, batch=32, length=128),
        "llama": Shape("llama", hidden=2048, intermediate=5504, layers=16, heads=16, batch=4, length=512),
    },
}


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A model in training mode, without dropout; in `dtype`, or float32 on the CPU and bfloat16 on a GPU.

    The embeddings' output requires a gradient, so that the backward pass goes through every layer whatever trains.
    """
    torch.manual_seed(0)
    model: PreTrainedModel
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "pad_token_id": 0,
    }
    with device:  # a GPU draws the numbers of a large model in a fraction of the CPU's time
        if shape.family == "bert":
            no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model = BertForSequenceClassification(BertConfig(**sizes, **no_dropout))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))
    model.enable_input_require_grads()
    return nn.Module.to(model, device, dtype or dtype_on(device)).train()


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def make_batch(shape: Shape, device: torch.device, padded: bool) -> dict[str, torch.Tensor]:
    """A batch of random tokens with labels; if `padded`, the second half of every sequence is padding.

    Padding gets no gradient from the loss: its rows of ∂L/∂y are exactly zero.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, shape.vocabulary, (shape.batch, shape.length), generator=generator)
    attended = torch.ones_like(tokens)
    if padded:
        attended[:, shape.length // 2 :] = 0
        tokens = tokens * attended
    if shape.family == "bert":
        labels = torch.randint(0, 2, (shape.batch,), generator=generator)
    else:
        labels = tokens.masked_fill(attended == 0, -100)
    batch = {"input_ids": tokens, "attention_mask": attended, "labels": labels}
    return {key: tensor.to(device) for key, tensor in batch.items()}
