"""The default targets: exactly the MLP layers of each model, by their full names."""

from __future__ import annotations

import pytest
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from peft_sparsegrad import SparseGradConfig, SparseGradLinear

BERT_LIKE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {**BERT_LIKE, "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0}
GEMMA_LIKE = {**LLAMA_LIKE, "head_dim": 8}
GPT_LIKE = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "rotary_dim": 4}
BLOCKS = "encoder.layer.{}."
BERT_MLP = [BLOCKS + "intermediate.dense", BLOCKS + "output.dense"]
UP_DOWN = ["layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj"]
T5_SIZES = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
T5_BLOCKS = ("encoder.block.{}.layer.1.DenseReluDense.", "decoder.block.{}.layer.2.DenseReluDense.")
BART_SIZES = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
}
SMALL = {"vocab_size": 50}

# Configuration class: its sizes, and the names of the layers to adapt, with {} for the block.
MODELS = {
    "Bert": ({**BERT_LIKE, **SMALL}, BERT_MLP),
    "Roberta": ({**BERT_LIKE, **SMALL}, BERT_MLP),
    "XLMRoberta": ({**BERT_LIKE, **SMALL}, BERT_MLP),
    "Electra": ({**BERT_LIKE, **SMALL, "embedding_size": 16}, BERT_MLP),
    "Deberta": ({**BERT_LIKE, **SMALL}, BERT_MLP),
    "DebertaV2": ({**BERT_LIKE, **SMALL}, BERT_MLP),
    "DistilBert": (
        {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, **SMALL},
        ["transformer.layer.{}.ffn.lin1", "transformer.layer.{}.ffn.lin2"],
    ),
    "Albert": (
        {**BERT_LIKE, **SMALL, "embedding_size": 16, "num_hidden_groups": 2},
        [
            "encoder.albert_layer_groups.{}.albert_layers.0.ffn",
            "encoder.albert_layer_groups.{}.albert_layers.0.ffn_output",
        ],
    ),
    "ModernBert": ({**BERT_LIKE, **SMALL, "pad_token_id": 0}, ["layers.{}.mlp.Wi", "layers.{}.mlp.Wo"]),
    "ViT": ({**BERT_LIKE, "image_size": 8, "patch_size": 4}, None),
    "GPT2": (GPT_LIKE, ["h.{}.mlp.c_fc", "h.{}.mlp.c_proj"]),
    "GPTJ": (GPT_LIKE, ["h.{}.mlp.fc_in", "h.{}.mlp.fc_out"]),
    "GPTNeoX": ({**BERT_LIKE, **SMALL}, ["layers.{}.mlp.dense_h_to_4h", "layers.{}.mlp.dense_4h_to_h"]),
    "Falcon": ({**BERT_LIKE, **SMALL}, ["h.{}.mlp.dense_h_to_4h", "h.{}.mlp.dense_4h_to_h"]),
    "OPT": (
        {**BERT_LIKE, **SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16},
        ["decoder.layers.{}.fc1", "decoder.layers.{}.fc2"],
    ),
    "Llama": (LLAMA_LIKE, UP_DOWN),
    "Mistral": (LLAMA_LIKE, UP_DOWN),
    "Qwen2": (LLAMA_LIKE, UP_DOWN),
    "Qwen3": (GEMMA_LIKE, UP_DOWN),
    "Gemma2": (GEMMA_LIKE, UP_DOWN),
    "Gemma3Text": (GEMMA_LIKE, UP_DOWN),
    "Phi3": (LLAMA_LIKE, ["layers.{}.mlp.gate_up_proj", "layers.{}.mlp.down_proj"]),
    "T5": (T5_SIZES, [block + name for block in T5_BLOCKS for name in ("wi", "wo")]),
    "T5 gated": (
        {**T5_SIZES, "feed_forward_proj": "gated-gelu"},
        [block + name for block in T5_BLOCKS for name in ("wi_0", "wi_1", "wo")],
    ),
    "Bart": (
        {**BART_SIZES, **SMALL, "d_model": 16, "max_position_embeddings": 20},
        [f"{side}.layers.{{}}.{name}" for side in ("encoder", "decoder") for name in ("fc1", "fc2")],
    ),
}


def tiny(name: str, auto_class: type = AutoModel) -> nn.Module:
    config_class = getattr(transformers, name.split()[0] + "Config")
    return auto_class.from_config(config_class(**MODELS[name][0]))


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SparseGradLinear)}


def names(patterns: list[str], blocks=(0, 1)) -> set[str]:
    return {f"base_model.model.{pattern.format(block)}" for pattern in patterns for block in blocks}


def vit_mlp(model: nn.Module) -> set[str]:
    """ViT's blocks have been renamed across versions of transformers: its MLP is what widens or narrows."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {f"base_model.model.{n}" for n, m in linear.items() if {m.in_features, m.out_features} == {16, 32}}


@pytest.mark.parametrize("name", MODELS)
def test_default_targets_are_exactly_the_mlp_layers(name):
    model = tiny(name)
    expected = vit_mlp(model) if name == "ViT" else names(MODELS[name][1])
    assert len(expected) >= 4
    peft_model = get_peft_model(model, SparseGradConfig(warmup_steps=0))
    assert adapted(peft_model) == expected


@pytest.mark.parametrize(
    ("name", "auto_class", "prefix"),
    [
        ("Bert", AutoModelForSequenceClassification, "bert."),
        ("DistilBert", AutoModelForSequenceClassification, "distilbert."),
        ("Llama", AutoModelForCausalLM, "model."),
        ("GPT2", AutoModelForCausalLM, "transformer."),
    ],
)
@pytest.mark.parametrize("blocks", [[0], [1], 1, [0, 1]])
def test_layers_to_transform_with_the_default_targets(name, auto_class, prefix, blocks):
    model = get_peft_model(tiny(name, auto_class), SparseGradConfig(warmup_steps=0, layers_to_transform=blocks))
    patterns = [prefix + pattern for pattern in MODELS[name][1]]
    assert adapted(model) == names(patterns, [blocks] if isinstance(blocks, int) else blocks)


@pytest.mark.parametrize("exclude", [["encoder.layer.0.output.dense"], r"encoder\.layer\.0\.output\.dense"])
def test_users_exclusion_is_kept_together_with_the_default_one(exclude):
    model = get_peft_model(tiny("Bert"), SparseGradConfig(warmup_steps=0, exclude_modules=exclude))
    expected = names(BERT_MLP) - {"base_model.model.encoder.layer.0.output.dense"}
    assert adapted(model) == expected


def test_users_regular_expression_with_alternatives():
    exclude = r"encoder\.layer\.0\..*|encoder\.layer\.1\.output\.dense"
    model = get_peft_model(tiny("Bert"), SparseGradConfig(warmup_steps=0, exclude_modules=exclude))
    assert adapted(model) == {"base_model.model.encoder.layer.1.intermediate.dense"}


def test_users_own_targets_are_taken_as_they_are():
    model = get_peft_model(tiny("Bert"), SparseGradConfig(warmup_steps=0, target_modules=["attention.output.dense"]))
    assert adapted(model) == names(["encoder.layer.{}.attention.output.dense"])


def test_all_linear():
    model = tiny("Llama")
    linear = {f"base_model.model.{name}" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(linear) == 14
    model = get_peft_model(model, SparseGradConfig(warmup_steps=0, target_modules="all-linear"))
    assert adapted(model) == linear


def test_unknown_model_type_is_named():
    class MyConfig(PretrainedConfig):
        model_type = "my-own-model"

    model = nn.Sequential(nn.Linear(8, 8))
    model.config = MyConfig()
    with pytest.raises(ValueError, match=r"target_modules.*'my-own-model'"):
        get_peft_model(model, SparseGradConfig(warmup_steps=0))
    assert type(model[0]) is nn.Linear


def test_plain_module_without_a_config_needs_targets():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), SparseGradConfig(warmup_steps=0))
