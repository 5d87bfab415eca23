"""Tiny models of many kinds, with the names and numbers of their blocks."""

from tiny import bert, llama
from transformers import (
    AlbertConfig,
    AlbertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=64, **SMALL))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes))


def albert():
    return AlbertModel(AlbertConfig(vocab_size=64, embedding_size=16, **SMALL))


def distilbert():
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=64, **sizes))


def mixtral():
    sizes = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, **SMALL, **sizes))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL))


def swin():
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(image_size=16, patch_size=2, **sizes))


def bare_llama():
    return LlamaModel(LlamaConfig(vocab_size=64, **{**SMALL, "num_hidden_layers": 3}))


MODELS = {
    # the model; names of the lists; blocks in each; modules trained by default in the first block
    "bert": (bert, ["bert.encoder.layer"], 2, 8),
    "roberta": (roberta, ["roberta.encoder.layer"], 2, 8),
    "gpt2": (gpt2, ["transformer.h"], 2, 6),
    "t5": (t5, ["encoder.block", "decoder.block"], 2, 8),
    "llama": (llama, ["model.layers"], 3, 9),
    "bare llama": (bare_llama, ["layers"], 3, 9),
    "albert": (albert, ["encoder.albert_layer_groups"], 1, 8),
    "distilbert": (distilbert, ["distilbert.transformer.layer"], 2, 8),
    "mixtral": (mixtral, ["model.layers"], 2, None),
    "vit": (vit, None, 2, 8),
    "swin": (swin, ["swin.encoder.layers"], 2, None),
}
