"""The MLP layers that SparseGrad adapts if no `target_modules` are given."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..common.targets.experts_left_out import expert_names, warn_of_dense_layers_left_out
from ..common.targets.language_tower import language_tower, warn_of_other_towers
from ..common.targets.linear_layers import no_default
from ..common.targets.modules import base_modules
from ..common.targets.unmatched_names import unmatched

# "output.dense" also ends the name of the attention's output projection in BERT's family: see EXCLUDED_MODULES.
_BERT_FAMILY = (
    "bert bert-generation big_bird bros camembert canine convbert data2vec-text deberta deberta-v2 electra ernie esm "
    "fnet layoutlm layoutlmv2 layoutlmv3 lilt longformer luke markuplm megatron-bert mobilebert mpnet mra "
    "nystromformer rembert roberta roberta-prelayernorm roc_bert roformer sew-d splinter tapas visual_bert "
    "xlm-roberta xlm-roberta-xl xmod yoso"
)
_VIT_FAMILY = (  # named like BERT's in transformers 4, fc1 and fc2 in some of transformers 5
    "audio-spectrogram-transformer beit data2vec-vision deit donut-swin dpt ijepa swin swinv2 timesformer videomae "
    "vit vit_mae vit_msn vivit yolos"
)
_SIGLIP_FAMILY = "siglip siglip2 siglip2_vision_model siglip_vision_model"

# Module names, and the model types that use them. Of gated MLPs the paper adapts the up and down projections, and of
# mixtures this names the shared experts and the dense blocks: fused experts are parameters and no modules.
_FAMILIES: list[tuple[list[str], str]] = [
    (
        ["up_proj", "down_proj"],
        "afmoe aimv2_vision_model apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam bitnet cohere cohere2 "
        "cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama dinov3_vit doge dots1 dots3_note_text "
        "ernie4_5 ernie4_5_moe esmc eurobert exaone4 exaone_moe falcon_h1 flint gemma gemma2 gemma3 gemma3_text "
        "gemma3n_text gemma4 gemma4_text gemma4_unified_text glm4_moe glm4_moe_lite glm_moe_dsa granite granite_swa "
        "gte helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 "
        "jamba kimi_linear kolibri1 laguna llama llama4_text minicpm3 ministral ministral3 mistral mistral4 "
        "mllama_text_model nemotron nemotron_h nomic_bert olmo olmo2 olmo3 olmo_hybrid pixtral qwen2 "
        "qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_5_moe_text qwen3_5_text qwen3_next qwen3_vl_text "
        "qwen4_exp_text recurrent_gemma seed_oss smollm3 solar_open stablelm t5gemma t5gemma2 ultrabert vaultgemma "
        "youtu",
    ),
    (["gate_up_proj", "down_proj"], "glm glm4 glm4v_text glm_ocr_text minimax_m3_vl_text phi3 phi4_multimodal"),
    (["feed_forward.w2", "feed_forward.w3"], "lfm2 lfm2_moe lfm3"),
    (["shared_mlp.input_linear", "shared_mlp.output_linear"], "granitemoe_swa granitemoehybrid granitemoeshared"),
    (
        ["fc1", "fc2"],
        "bart bigbird_pegasus biogpt blenderbot blenderbot-small clip clip_text_model clip_vision_model fsmt git_text "
        "led m2m_100 marian mbart metaclip_2 mvp nllb-moe opt pegasus pegasus_x phi plbart seamless_m4t "
        "seamless_m4t_v2 trocr whisper xglm " + _SIGLIP_FAMILY,
    ),
    (["mlp.c_fc", "mlp.c_proj"], "btlm gpt-sw3 gpt2 gpt_bigcode gpt_neo imagegpt openai-gpt starcoder2"),
    (["mlp.fc_in", "mlp.fc_out"], "codegen gptj"),
    (
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox gpt_neox_japanese persimmon",
    ),
    (["wi", "wi_0", "wi_1", "wo"], "longt5 mt5 pop2piano switch_transformers t5 umt5"),
    (["ffn.lin1", "ffn.lin2"], "distilbert"),
    (["lin1", "lin2"], "flaubert xlm"),
    (["ffn", "ffn_output"], "albert"),
    (["ffn.up_proj", "ffn.down_proj"], "mpt"),
    (["ffn.proj_up", "ffn.proj_down"], "xlstm"),
    (["ffn.linear_1", "ffn.linear_2"], "funnel"),
    (["ff.layer_1", "ff.layer_2"], "xlnet"),
    (["ffn.0", "ffn.2"], "ctrl"),
    (["ffn.key", "ffn.value"], "rwkv7"),
    (["feed_forward.key", "feed_forward.value"], "rwkv"),
    (["feed_forward.intermediate", "feed_forward.output"], "prophetnet"),
    (["mlp.Wi", "mlp.Wo"], "modernbert modernbert-decoder"),
    (
        ["mlp.fc1", "mlp.fc2"],
        "dinov2 dinov2_with_registers focalnet hiera "
        "jina_embeddings_v3 mlcd_vision_model moonshine nanochat segformer",
    ),
    (["mlp.dense1", "mlp.dense2"], "pvt_v2"),
    (["pwconv1", "pwconv2"], "convnext convnextv2"),
    (
        ["intermediate_dense", "output_dense"],
        "data2vec-audio hubert sew speecht5 unispeech unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm",
    ),
    (["linear1", "linear2"], "parakeet_ctc"),
    (["intermediate.dense", "output.dense"], _BERT_FAMILY),
    (["intermediate.dense", "output.dense", "mlp.fc1", "mlp.fc2"], _VIT_FAMILY),
]

TARGET_MODULES: dict[str, list[str]] = {
    model_type: names for names, model_types in _FAMILIES for model_type in model_types.split()
}
EXCLUDED_MODULES: dict[str, list[str]] = {
    **{model_type: ["attention.output.dense"] for model_type in f"{_BERT_FAMILY} {_VIT_FAMILY}".split()},
    # The pooling head is no transformer block, and no part of a classifier's loss.
    **{model_type: ["head.mlp.fc1", "head.mlp.fc2"] for model_type in _SIGLIP_FAMILY.split()},
}


def set_default_targets(config: Any, model: nn.Module, model_type: str | None) -> None:
    """Fill in `target_modules`, and exclude other modules of the same names, for a known model type.

    Of a type that is not known, the fused experts are the default, as `target_parameters`; MLP layers beside them are
    named in a warning.

    Args:
        config: A configuration of SparseGrad without `target_modules`.
        model: The base model, of which a model for text and images has default targets in its language tower.
        model_type: The model type of its configuration.

    Raises:
        ValueError: If the type is not known and has no experts. The message lists the model's linear layers.
    """
    tower = language_tower(model)
    text_type = tower[1] if tower else str(model_type)
    if text_type not in TARGET_MODULES:
        config.target_parameters = config.target_parameters or expert_names(model)
        if not config.target_parameters:
            raise no_default(f"SparseGrad has no default for the model type {model_type!r}", model)
        warn_of_dense_layers_left_out(model, config.target_parameters, tower[0] if tower else None)
    names = TARGET_MODULES.get(text_type, [])
    missing = unmatched(names, [name for name, _ in base_modules(model)])  # variants of a type have one of some names
    config.target_modules = set(names) - set(missing) or set(names)
    _exclude(config, EXCLUDED_MODULES.get(text_type, []))
    if tower:
        _exclude_all_but(config, tower[0])
        warn_of_other_towers("SparseGrad", tower[0])


def _exclude(config: Any, names: list[str]) -> None:
    """Add `names` to the modules that a configuration excludes, by a list of names or by a regular expression."""
    if not names:
        return
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = rf"(?:{config.exclude_modules})|{_ending_with(names)}"
    else:
        config.exclude_modules = set(config.exclude_modules or ()) | set(names)


def _exclude_all_but(config: Any, tower: str) -> None:
    """Add all modules outside of `tower` to those that a configuration excludes."""
    if not isinstance(config.exclude_modules, str):
        config.exclude_modules = _ending_with(config.exclude_modules) if config.exclude_modules else "(?!)"
    config.exclude_modules = rf"(?:{config.exclude_modules})|(?!{re.escape(tower)}\.).*"


def _ending_with(names: Iterable[str]) -> str:
    return rf"(?:(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(names)))}))"
