"""What GradDrop trains by default and on request, and the targets that it refuses."""

import pytest
import torch
from block_models import MODELS, bare_llama, gpt2, mixtral, swin, t5
from graddrop_tools import dropped, graddrop_layers
from peft import get_peft_model
from tiny import bert, llama
from torch import nn

from peft_sparsegrad import GradDropConfig
from peft_sparsegrad.graddrop.blocks import block_of, find_blocks


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


def test_normalisation_without_a_weight_or_with_other_parameters_is_left_alone():
    class OddNorm(nn.LayerNorm):
        def __init__(self, size):
            super().__init__(size)
            self.gain = nn.Parameter(torch.ones(size))

    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), OddNorm(4), nn.RMSNorm(4))
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert set(graddrop_layers(get_peft_model(model, GradDropConfig()))) == {"layers.0.0", "layers.0.3"}


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
