"""Blocks and default targets of models of many kinds."""

import accelerate
import pytest
import torch
from graddrop_tools import deltas, dropped, graddrop_layers, masks_of
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import batch, bert, llama
from torch import nn
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

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.graddrop.blocks import block_of, find_blocks

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


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of(name):
    make, lists, count, _ = MODELS[name]
    blocks = find_blocks(make())
    if lists is None:  # its name differs between versions of transformers
        lists = [blocks[0].removesuffix(".0")]
    assert blocks == [f"{parent}.{index}" for parent in lists for index in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_default_targets_are_what_is_trainable_inside_the_blocks(name):
    make, _, _, in_first = MODELS[name]
    base = make()
    blocks = find_blocks(base)
    kinds = {module_name: type(module).__name__ for module_name, module in base.named_modules()}
    expected = {
        module_name
        for module_name, kind in kinds.items()
        if (kind in ("Linear", "Conv1D", "Conv2d") or kind.endswith("Norm")) and block_of(module_name, blocks)
    }
    layers = graddrop_layers(dropped(base))
    assert set(layers) == expected
    assert {layer.graddrop_block for layer in layers.values()} == set(blocks)
    assert all(module.startswith(f"{layer.graddrop_block}.") for module, layer in layers.items())
    if in_first is not None:
        assert sum(layer.graddrop_block == blocks[0] for layer in layers.values()) == in_first


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_heads_are_left_alone(name):
    model = dropped(MODELS[name][0]())
    trained = [
        module for module in graddrop_layers(model) if "embed" in module or "wte" in module or "shared" in module
    ]
    heads = [module for module in graddrop_layers(model) if "head" in module or "classifier" in module]
    assert (trained, heads) == ([], [])
    assert not any(p.requires_grad for key, p in model.named_parameters() if "graddrop_" not in key)


def test_relative_position_embedding_inside_a_block_is_left_alone():
    layers = graddrop_layers(dropped(t5()))
    assert not any("relative_attention_bias" in name for name in layers)


def test_layers_are_counted_from_the_encoders_input_to_the_decoders_output():
    assert masks_of(dropped(t5())).blocks == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]


def test_embedding_trains_on_request():
    model = dropped(target_modules=["embed_tokens", "q_proj"], p=0.0)
    assert "model.embed_tokens" in graddrop_layers(model)
    ids = batch()["input_ids"]
    model(ids).logits.square().sum().backward()
    gradient = deltas(model)["model.embed_tokens.weight"].grad
    seen = ids.unique()
    assert gradient[seen].any(1).all()
    assert gradient.any(1).sum() == len(seen)


def test_module_outside_of_all_blocks_is_a_layer_of_its_own():
    model = dropped(target_modules=["embed_tokens", "q_proj", "lm_head"])
    assert masks_of(model).blocks == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "lm_head"]


def test_task_head_is_saved_on_request_and_not_masked():
    model = dropped(bert(), modules_to_save=["classifier"])
    assert not any("classifier" in name for name in graddrop_layers(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "graddrop_" not in n} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }


@pytest.mark.parametrize("indices", [1, [1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("make", [llama, bare_llama])
def test_layers_to_transform(make, indices):
    layers = graddrop_layers(dropped(make(), layers_to_transform=indices))
    assert len(layers) == 9 * len({layer.graddrop_block for layer in layers.values()})
    numbers = {int(layer.graddrop_block.rpartition(".")[2]) for layer in layers.values()}
    assert numbers == set(indices if isinstance(indices, list) else [indices])


@pytest.mark.parametrize("make", [t5, swin, mixtral, gpt2])
def test_layers_to_transform_counts_blocks_and_not_lists_inside_of_them(make):
    everything = graddrop_layers(dropped(make()))
    for index in (0, 1):
        layers = graddrop_layers(dropped(make(), layers_to_transform=[index]))
        assert set(layers) == {n for n, layer in everything.items() if layer.graddrop_block.endswith(f".{index}")}


def test_layers_to_transform_of_a_list_of_targets():
    layers = graddrop_layers(dropped(layers_to_transform=[1], target_modules=["q_proj", "up_proj"]))
    assert set(layers) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])})
        self.image = nn.ModuleDict({"h": nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])})

    def forward(self, x):
        for block in [*self.text["layers"], *self.image["h"]]:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, {"text.layers.1.0", "image.h.1.0"}),
        ("h", {"image.h.1.0"}),
        (["layers"], {"text.layers.1.0"}),
        (["layers", "h"], {"text.layers.1.0", "image.h.1.0"}),
    ],
)
def test_layers_pattern(pattern, expected):
    assert set(graddrop_layers(dropped(Towers(), layers_to_transform=[1], layers_pattern=pattern))) == expected


@pytest.mark.parametrize("excluded", [["down_proj", "input_layernorm"], r".*(down_proj|input_layernorm)"])
def test_exclude_modules(excluded):
    layers = graddrop_layers(dropped(exclude_modules=excluded))
    assert len(layers) == 3 * 7
    assert not any(name.endswith(("down_proj", "input_layernorm")) for name in layers)


def test_all_linear_trains_no_normalisation_and_no_head():
    names = graddrop_layers(dropped(target_modules="all-linear"))
    assert len(names) == 3 * 7
    assert all(name.endswith("_proj") for name in names)


def test_regular_expression():
    assert set(graddrop_layers(dropped(target_modules=r".*\.[02]\..*norm"))) == {
        f"model.layers.{i}.{norm}" for i in (0, 2) for norm in ("input_layernorm", "post_attention_layernorm")
    }


class Headed(nn.Module):
    """Blocks, and task heads in a list."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_list_of_heads_is_no_list_of_blocks():
    assert find_blocks(Headed()) == ["layers.0", "layers.1"]


def test_sequential_with_a_usual_name_is_a_list_of_blocks():
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ModuleList([nn.Linear(4, 4)]))})
    assert find_blocks(model) == ["blocks.0", "blocks.1"]


def test_list_of_modules_of_several_classes_needs_a_usual_name():
    parts = [nn.Sequential(nn.Linear(4, 4)), nn.ModuleList([nn.Linear(4, 4)])]
    assert find_blocks(nn.ModuleDict({"parts": nn.ModuleList(parts)})) == []
    assert find_blocks(nn.ModuleDict({"parts": nn.ModuleList(parts[:1])})) == ["parts.0"]


def test_list_with_a_bare_layer_in_it_is_no_list_of_blocks():
    parts = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))]
    assert find_blocks(nn.ModuleDict({"layers": nn.ModuleList(parts)})) == []


def test_block_of_tells_one_from_ten():
    blocks = [f"layers.{i}" for i in range(12)]
    assert [block_of(f"layers.{i}.up.weight", blocks) for i in (1, 10, 11)] == ["layers.1", "layers.10", "layers.11"]
    assert block_of("head.weight", blocks) is None


def test_all_linear_knows_its_blocks():
    masks = masks_of(dropped(target_modules="all-linear"))
    assert masks.blocks == [f"model.layers.{i}" for i in range(3)]


def test_normalisation_without_a_weight_or_with_other_parameters_is_left_alone():
    class OddNorm(nn.LayerNorm):
        def __init__(self, size):
            super().__init__(size)
            self.gain = nn.Parameter(torch.ones(size))

    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), OddNorm(4), nn.RMSNorm(4))
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert set(graddrop_layers(get_peft_model(model, GradDropConfig()))) == {"layers.0.0", "layers.0.3"}


def test_adapter_of_another_name_is_active():
    model = get_peft_model(llama(), GradDropConfig(p=0.0, init_weights=False), adapter_name="mine")
    model(**batch()).loss.backward()
    assert all(delta.grad is not None for delta in deltas(model, "mine").values())


def test_graddrop_on_top_of_another_methods_adapter_keeps_what_that_does():
    model = llama()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    with torch.no_grad():
        expected = model(batch()["input_ids"]).logits
    inject_adapter_in_model(GradDropConfig(target_modules=["q_proj"]), model)
    with torch.no_grad():
        assert torch.allclose(model(batch()["input_ids"]).logits, expected, atol=1e-6)


def test_list_of_adapted_heads_is_still_no_list_of_blocks():
    model = get_peft_model(Headed(), LoraConfig(target_modules=r"heads\.\d|layers\.\d\.0", r=2))
    assert any("heads.0.lora_A" in name for name, _ in model.named_parameters())
    masked = {masked.name for masked in GradDrop(model, GradDropConfig()).masked_parameters()}
    assert masked
    assert not any("heads" in name for name in masked)


def test_model_without_blocks_is_told_what_to_do():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"specify `target_modules`.*found no transformer blocks"):
        get_peft_model(model, GradDropConfig())
    assert type(model[0]) is nn.Linear


def test_index_that_no_block_has_is_refused():
    with pytest.raises(ValueError, match=r"`layers_to_transform=\[7\]` .* none of the model's 3 blocks"):
        dropped(layers_to_transform=[7])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])


@pytest.mark.parametrize("name", ["pool", "wide", "attention", "layers"])
def test_unsupported_target_is_refused_before_anything_changes(name):
    model = Odd()
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match=rf"'{name}' is a {type(getattr(model, name)).__name__}.*exclude_modules"):
        get_peft_model(model, GradDropConfig(target_modules=["linear", "norm", name]))
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[key] is module for key, module in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_output_projection_of_multihead_attention_is_refused():
    model = Odd()
    with pytest.raises(TypeError, match=r"'attention\.out_proj' is part of a MultiheadAttention"):
        get_peft_model(model, GradDropConfig(target_modules=["linear", "out_proj"]))
    assert type(model.linear) is nn.Linear


def test_default_targets_of_torchs_own_encoder_leave_out_what_an_adapter_cannot_reach():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = get_peft_model(encoder, GradDropConfig())
    assert not any("out_proj" in name for name in graddrop_layers(model))
    assert len(graddrop_layers(model)) == 2 * 4


def test_conv1d_of_gpt2_trains():
    model = dropped(gpt2(), p=0.0)
    model(**batch()).loss.backward()
    delta = deltas(model)["transformer.h.0.attn.c_attn.weight"]
    assert delta.shape == (32, 96)
    assert delta.grad.any()


@pytest.mark.parametrize("make", [bert, roberta, gpt2, albert, distilbert, mixtral, llama])
def test_every_default_target_gets_a_gradient(make):
    model = dropped(make(), p=0.0).eval()
    output = model(input_ids=batch()["input_ids"])
    (output[0].square().sum() + 0.0).backward()
    assert [name for name, delta in deltas(model).items() if delta.grad is None] == []


def test_vit_trains():
    model = dropped(vit(), p=0.0)
    model(pixel_values=torch.randn(2, 3, 16, 16)).logits.square().sum().backward()
    assert all(delta.grad is not None for delta in deltas(model).values())


def test_what_cannot_be_trained_inside_the_blocks_is_said():
    """Experts that are fused into one parameter, for instance."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)
            self.experts = nn.Parameter(torch.zeros(3, 4, 4))

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    with pytest.warns(UserWarning, match=r"75\.0% of the parameters inside the blocks .* 'layers\.0\.experts'"):
        get_peft_model(model, GradDropConfig())


def test_all_of_an_ordinary_model_can_be_trained(recwarn):
    for model in (llama(), bert()):
        get_peft_model(model, GradDropConfig())
    assert not [warning for warning in recwarn if "inside the blocks" in str(warning.message)]


def test_offloaded_normalisation_layer_is_refused_in_one_sentence():
    model = llama()
    accelerate.cpu_offload(model)
    get_peft_model(model, GradDropConfig(inference_mode=True))
    with pytest.raises(RuntimeError, match=r"'model\.layers\.0\.input_layernorm' is on the meta.*`exclude_modules`"):
        model(**batch())


def test_offloaded_delta_is_refused_in_one_sentence():
    model = get_peft_model(llama(), GradDropConfig(exclude_modules=r".*norm"))
    accelerate.cpu_offload(model.get_base_model())
    with pytest.raises(
        RuntimeError,
        match=r"'model\.layers\.0\.self_attn\.q_proj' is on the meta",
    ):
        model(**batch())


def test_offloaded_linear_layers_give_the_same_output():
    outputs = []
    for offload in (False, True):
        model = llama()
        if offload:
            accelerate.cpu_offload(model)
        torch.manual_seed(1)
        config = GradDropConfig(exclude_modules=r".*norm", init_weights=False, inference_mode=True)
        outputs.append(get_peft_model(model, config)(**batch()))
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-5)
    assert not torch.allclose(outputs[0].logits, llama()(**batch()).logits, atol=1e-2)
