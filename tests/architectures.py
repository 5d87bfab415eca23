"""Tiny models of transformers' own architectures, each built from its configuration with small sizes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from not_built import NOT_BUILT, SAYS_NOTHING
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

HIDDEN, INTERMEDIATE, VOCAB, LENGTH = 32, 48, 96, 6

# Small values of fields, which have one of these names in each configuration.
_SIZES: list[tuple[float, str]] = [
    (
        HIDDEN,
        "hidden_size d_model n_embd dim embed_dim embedding_size decoder_hidden_size emb_dim word_embed_proj_dim "
        "projection_dim model_dim encoder_hidden_size cross_attention_hidden_size lru_width attention_hidden_size "
        "text_embed_dim hidden_dim_size output_hidden_size mm_hidden_size fusion_hidden_size max_seq_len_hint "
        "proj_hidden_size dim_model",
    ),
    (
        INTERMEDIATE,
        "intermediate_size d_ff n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim moe_intermediate_size hidden_dim "
        "shared_expert_intermediate_size ffn_hidden_size dim_ff moe_shared_expert_intermediate_size "
        "intermediate_size_mlp shared_intermediate_size block_ff_dim moe_ffn_hidden_size ffn_dim_size "
        "expert_ffn_hidden_size dense_intermediate_size prefix_dense_intermediate_size mlp_dim share_expert_dim "
        "decoder_intermediate_size expert_ffn_size",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers depth "
        "num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers num_experts_per_tok "
        "num_experts_per_token moe_topk moe_top_k top_k_experts num_blocks encoder_num_layers decoder_num_layers "
        "vision_layers qformer_num_hidden_layers linear_num_key_heads linear_num_value_heads speech_encoder_layers "
        "text_encoder_layers text_decoder_layers num_mem_blocks num_conv_pos_embedding_groups moe_k",
    ),
    (
        4,
        "n_kv_heads kv_n_heads encoder_num_key_value_heads decoder_num_key_value_heads num_key_value_heads "
        "num_kv_heads num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts num_encoder_attention_heads "
        "num_decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads patch_size "
        "attention_heads patch_temporal_size speech_encoder_attention_heads num_codebooks mamba_d_state state_size "
        "ssm_state_size",
    ),
    (
        8,
        "head_dim d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank q_lora_rank rotary_dim "
        "attention_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim num_mel_bins global_head_dim "
        "mamba_d_head index_head_dim swa_head_dim v_head_size qk_head_dim lightning_head_dim swa_v_head_dim "
        "num_conv_pos_embeddings mamba_dt_rank time_step_rank n_mels input_feat_per_channel",
    ),
    (
        16,
        "image_size crop_size chunk_size mamba_chunk_size hidden_size_per_layer_input img_size",
    ),
    (
        VOCAB,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size text_vocab_size",
    ),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions seq_length",
    ),
    (
        0,
        "pad_token_id",
    ),
    (
        0.0,
        "dropout hidden_dropout_prob attention_probs_dropout_prob attention_dropout activation_dropout embd_pdrop "
        "attn_pdrop resid_pdrop drop_path_rate layerdrop encoder_layerdrop decoder_layerdrop hidden_dropout "
        "feat_proj_dropout final_dropout mask_time_prob mask_feature_prob dropout_rate",
    ),
    (
        1,
        "bos_token_id decoder_start_token_id num_nextn_predict_layers n_group topk_group first_k_dense_replace "
        "n_shared_experts moe_num_shared_experts mamba_n_groups n_groups num_expert_group num_limited_groups",
    ),
    (
        3,
        "eos_token_id image_token_id image_token_index audio_token_id audio_token_index video_token_id boi_token_id "
        "eoi_token_id vision_start_token_id boi_token_index eoi_token_index image_start_token_id image_end_token_id "
        "video_token_index",
    ),
]
_VALUES = {name: value for value, names in _SIZES for name in names.split()}

# Values for a model type that the above does not fit.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
_HYBRID = {"num_hidden_layers": 4}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_STAGES = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "image_size": 32, "patch_size": 4}
_EXTRA: dict[str, dict[str, Any]] = {
    "llama4": {
        "vision_config": {
            "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        },
    },
    "siglip2": {"vision_config": {"num_patches": 16}},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "bailing_hybrid": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "qwen2_vl": {"text_config": _SECTIONS},
    "qwen2_5_vl": {"text_config": _SECTIONS},
    "paddleocr_vl": {"text_config": _SECTIONS},
    "swin": _STAGES,
    "swinv2": _STAGES,
    "donut-swin": _STAGES,
    "convnext": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    "segformer": {
        "num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4],
        "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "image_size": 32,
        "decoder_hidden_size": 16,
    },
    "wav2vec2-bert": {"feature_projection_input_dim": 128},
    "parakeet_ctc": {"encoder_config": {"num_mel_bins": 128}},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
}  # fmt: skip

# Towers, which have no task of their own.
_BASE_MODELS = [
    "clip_text_model",
    "clip_vision_model",
    "dinov3_vit",
    "mlcd_vision_model",
    "pixtral",
    "siglip_vision_model",
    "splinter",
    "vit_mae",
]

# The task models, first match wins.
_TASKS = [
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "MULTIMODAL_LM",
]


def model_types() -> list[str]:
    """Return the model types of transformers for text, images or sound whose tiny models can be tried."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in _TASKS]
    found = dict.fromkeys(model_type for mapping in mappings for model_type in mapping)
    return [each for each in [*found, *_BASE_MODELS] if each not in NOT_BUILT and each not in SAYS_NOTHING]


def small_config(model_type: str) -> Any:
    """Return a configuration of the model type with small sizes."""
    config = CONFIG_MAPPING[model_type](**_small(CONFIG_MAPPING[model_type], _EXTRA.get(model_type, {})))
    if model_type == "llama4":
        config.pad_token_id = 0  # which its model reads, and its configuration lacks
    return config


def _small(config_class: Any, extra: dict[str, Any]) -> dict[str, Any]:
    default = config_class()
    values: dict[str, Any] = {}
    for name, value in _VALUES.items():
        own = vars(default).get(name, [])
        if name in _fields(config_class) and not isinstance(own, (list, tuple, dict)):
            values[name] = type(own)(value) if isinstance(own, (int, float)) else value
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            own_extra = extra.get(name, {})
            values[name] = {**_small(type(part), own_extra), "model_type": part.model_type}
    return {
        **values,
        **{name: value for name, value in extra.items() if name not in values or not isinstance(value, dict)},
    }


def _fields(config_class: Any) -> set[str]:
    fields = {name for each in config_class.__mro__ for name in getattr(each, "__annotations__", {})}
    return fields | set(inspect.signature(config_class.__init__).parameters)


def model_class(model_type: str) -> type:
    """Return the class that computes logits for the model type, or its base model."""
    if model_type == "llama4":  # listed with the class of its text model, which takes another configuration
        return transformers.Llama4ForConditionalGeneration
    for task in _TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        if model_type in names:
            name = names[model_type]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    name = modeling_auto.MODEL_MAPPING_NAMES[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def tiny_model(model_type: str) -> Any:
    """Return a tiny model of the type, with random weights."""
    torch.manual_seed(0)
    model = model_class(model_type)(small_config(model_type))
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return model.eval()


def tiny_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs for a model, without labels: text where it takes any."""
    generator = torch.Generator().manual_seed(0)
    config, kind = model.config, model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    ids = torch.randint(5, 64, (2, LENGTH), generator=generator)
    images = torch.randn(2, getattr(config, "num_channels", 3), *_image_size(config), generator=generator)
    inputs: dict[str, torch.Tensor] = {}
    if "input_ids" in parameters:
        inputs["input_ids"] = ids
    needed = [name for name, each in parameters.items() if each.default is inspect.Parameter.empty]
    if "pixel_values" in needed or ("pixel_values" in parameters and not inputs):
        inputs["pixel_values"] = images
    if kind in ("input_values", "input_features") and not inputs:
        shape = (2, 1600) if kind == "input_values" else (2, *_frames(config))
        inputs[kind] = torch.randn(shape, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids
    if model.config.model_type == "siglip2":  # images in patches, of which a row of the grid may be padding
        inputs["pixel_values"] = torch.randn(2, 16, 3 * 4 * 4, generator=generator)
        inputs["pixel_attention_mask"] = torch.ones(2, 16, dtype=torch.long)
        inputs["spatial_shapes"] = torch.tensor([[4, 4], [4, 4]])
    if model.config.model_type in ("bros", "lilt"):
        inputs["bbox"] = torch.zeros(2, LENGTH, 8 if model.config.model_type == "bros" else 4, dtype=torch.long)
    return inputs


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 16)
    return (size, size) if isinstance(size, int) else tuple(size[:2])


def _frames(config: Any) -> tuple[int, int]:
    if config.model_type == "whisper":
        return config.num_mel_bins, 2 * config.max_source_positions
    return 32, 128
