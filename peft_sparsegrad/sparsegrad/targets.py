"""The MLP layers that SparseGrad adapts if no `target_modules` are given."""

from __future__ import annotations

from typing import Any

# "output.dense" also ends the name of the attention's output projection in BERT's family: see EXCLUDED_MODULES.
_BERT_FAMILY = (
    "bert camembert deberta deberta-v2 electra ernie esm layoutlm megatron-bert mpnet roberta roformer xlm-roberta "
    "xlm-roberta-xl"
)
_VIT_FAMILY = "beit deit dpt vit"  # named like BERT's in transformers 4, fc1 and fc2 in transformers 5

# Module names, and the model types that use them. Of gated MLPs the paper adapts the up and down projections.
_FAMILIES: list[tuple[list[str], str]] = [
    (
        ["up_proj", "down_proj"],
        "arcee cohere cohere2 exaone4 gemma gemma2 gemma3 gemma3_text granite helium llama ministral mistral nemotron "
        "olmo olmo2 olmo3 qwen2 qwen3 smollm3 stablelm",
    ),
    (["gate_up_proj", "down_proj"], "glm glm4 phi3"),
    (["fc1", "fc2"], "bart biogpt blenderbot clip m2m_100 marian mbart opt pegasus phi plbart siglip whisper xglm"),
    (["mlp.c_fc", "mlp.c_proj"], "gpt2 gpt_bigcode gpt_neo starcoder2"),
    (["mlp.fc_in", "mlp.fc_out"], "codegen gptj"),
    (["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"], "bloom falcon gpt_neox"),
    (["wi", "wi_0", "wi_1", "wo"], "longt5 mt5 t5 umt5"),
    (["ffn.lin1", "ffn.lin2"], "distilbert"),
    (["ffn", "ffn_output"], "albert"),
    (["ffn.up_proj", "ffn.down_proj"], "mpt"),
    (["mlp.Wi", "mlp.Wo"], "modernbert"),
    (["mlp.fc1", "mlp.fc2"], "dinov2"),
    (["intermediate.dense", "output.dense"], _BERT_FAMILY),
    (["intermediate.dense", "output.dense", "mlp.fc1", "mlp.fc2"], _VIT_FAMILY),
]

TARGET_MODULES: dict[str, list[str]] = {
    model_type: names for names, model_types in _FAMILIES for model_type in model_types.split()
}
EXCLUDED_MODULES: dict[str, list[str]] = {
    model_type: ["attention.output.dense"] for model_type in f"{_BERT_FAMILY} {_VIT_FAMILY}".split()
}


def set_default_targets(config: Any, model_type: str | None) -> None:
    """Fill in `target_modules`, and exclude other modules of the same names, for a known model type.

    Raises:
        ValueError: If the type is not known.
    """
    if model_type not in TARGET_MODULES:
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: SparseGrad has no default for the model type "
            f"{model_type!r}. Name the linear layers of its MLP blocks."
        )
    config.target_modules = set(TARGET_MODULES[model_type])
    _exclude(config, EXCLUDED_MODULES.get(model_type, []))


def _exclude(config: Any, names: list[str]) -> None:
    """Add `names` to the modules that a configuration excludes, by a list of names or by a regular expression."""
    if not names:
        return
    if isinstance(config.exclude_modules, str):
        suffixes = "|".join(name.replace(".", r"\.") for name in names)
        config.exclude_modules = rf"(?:{config.exclude_modules})|(?:(?:.*\.)?(?:{suffixes}))"
    else:
        config.exclude_modules = set(config.exclude_modules or ()) | set(names)
