"""Linear layers that are not what they look like: refused if they are named, left alone by default."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model
from peft import get_peft_model
from torch import nn

from peft_sparsegrad import GradDropConfig, SparseGradConfig

CONFIGS = [SparseGradConfig, GradDropConfig]
ODD = {
    "phimoe": ("router", "PhimoeTopKRouter, a kind of Linear"),
    "llama4_text": ("router", "Llama4Router, a kind of Linear"),
    "mamba": ("dt_proj", "part of a MambaMixer"),
    "wavlm": ("q_proj", "part of a WavLMAttention"),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model_type", ODD)
def test_a_named_one_is_refused_before_anything_is_changed(model_type, config):
    model = tiny_model(model_type)
    kinds = [type(module) for module in model.modules()]
    target, words = ODD[model_type]
    with pytest.raises(TypeError, match=rf"{target}.*{words}.*exclude_modules"):
        get_peft_model(model, config(target_modules=[target]))
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("model_type", ODD)
def test_graddrops_default_leaves_it_alone(model_type):
    with pytest.warns(UserWarning, match="stay frozen"):
        model = get_peft_model(tiny_model(model_type), GradDropConfig())
    assert not any(name.endswith(f".{ODD[model_type][0]}") for name in model.targeted_module_names)
    assert model.targeted_module_names


@pytest.mark.parametrize("config", CONFIGS)
def test_a_subclass_that_computes_what_a_linear_layer_does_is_taken(config):
    model = get_peft_model(tiny_model("falcon"), config(target_modules=["dense_h_to_4h"]))
    assert len(model.targeted_module_names) == 2


@pytest.mark.parametrize("config", CONFIGS)
def test_attention_of_torch_is_refused_by_both(config):
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(TypeError, match=r"out_proj.*MultiheadAttention"):
        get_peft_model(nn.Sequential(layer), config(target_modules=["out_proj"]))


def test_a_model_without_values_is_judged_by_the_shape_of_the_result():
    with torch.device("meta"):
        model = tiny_model("phimoe")
    with pytest.raises(TypeError, match="PhimoeTopKRouter"):
        get_peft_model(model, SparseGradConfig(target_modules=["router"], warmup_steps=0))
