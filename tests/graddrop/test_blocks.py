"""Which modules of a model are its blocks, in which order, and which lists are none."""

import pytest
from block_models import MODELS, t5
from graddrop_tools import dropped, masks_of
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.graddrop.blocks import block_of, find_blocks


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of(name):
    make, lists, count, _ = MODELS[name]
    blocks = find_blocks(make())
    if lists is None:  # its name differs between versions of transformers
        lists = [blocks[0].removesuffix(".0")]
    assert blocks == [f"{parent}.{index}" for parent in lists for index in range(count)]


def test_layers_are_counted_from_the_encoders_input_to_the_decoders_output():
    assert masks_of(dropped(t5())).blocks == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]


def test_module_outside_of_all_blocks_is_a_layer_of_its_own():
    model = dropped(target_modules=["embed_tokens", "q_proj", "lm_head"])
    assert masks_of(model).blocks == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "lm_head"]


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
