"""The adapter file: what is stored in it, in which form and under which names."""

import json
import re

import pytest
import torch
from graddrop_checkpoint_tools import FILE, WEIGHT, fill, saved
from graddrop_tools import deltas, dropped, graddrop_layers, tower
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import bert, llama, logits

from peft_sparsegrad import GradDropConfig
from peft_sparsegrad.functional import packed_support_size


@pytest.fixture
def model():
    """An adapter whose deltas a test fills."""
    return dropped(tower(num_blocks=1, dtype=torch.float32), target_modules=["up", "down"])


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 64, 123, 124, 127, 128])
def test_form_that_takes_the_fewest_bytes_is_chosen(model, tmp_path, count):
    fill(deltas(model)["layers.0.up.weight"], count)
    tensors = saved(model, tmp_path)
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith(WEIGHT)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    dense = 4 * 128
    assert size == min(dense, 4 * count + packed_support_size(128, count) + 8)  # 8 for the shape
    if size == dense:
        assert parts.keys() == {WEIGHT}
        assert parts[WEIGHT].shape == (16, 8)
    else:
        assert parts.keys() == {WEIGHT, f"{WEIGHT}_support", f"{WEIGHT}_shape"}
        assert parts[f"{WEIGHT}_shape"].tolist() == [16, 8]
        assert parts[f"{WEIGHT}_support"].dtype == torch.uint8
        flat = deltas(model)["layers.0.up.weight"].detach().flatten()
        assert torch.equal(parts[WEIGHT], flat[flat != 0])


def test_bf16_values_count_two_bytes(tmp_path):
    base = tower(num_blocks=1, dtype=torch.bfloat16)
    model = get_peft_model(base, GradDropConfig(target_modules=["up"]), autocast_adapter_dtype=False)
    for count, dense in ((115, False), (116, True)):  # 2 · 115 + 16 + 8 < 256 <= 2 · 116 + 16 + 8
        fill(deltas(model)["layers.0.up.weight"], count)
        assert (f"{WEIGHT}_support" not in saved(model, tmp_path)) is dense


def test_untrained_adapter_takes_next_to_nothing(tmp_path):
    model = dropped()
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 450 * len(deltas(model)), "names of three tensors each"


@pytest.mark.parametrize("count", [0, 1, 5, 64, 128])
def test_every_form_is_read_again(model, tmp_path, count):
    for delta in deltas(model).values():
        fill(delta, min(count, delta.numel()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(num_blocks=1, dtype=torch.float32), tmp_path)
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())


def test_keys_are_those_of_peft_without_the_adapters_name(model, tmp_path):
    fill(deltas(model)["layers.0.up.weight"], 5)
    model.add_adapter("other", GradDropConfig(target_modules=["up"]))
    model.save_pretrained(tmp_path)
    keys = {*load_file(tmp_path / FILE), *load_file(tmp_path / "other" / FILE)}
    module = r"base_model\.model\.layers\.0\.(up|down)\.graddrop_adapter"
    assert all(re.fullmatch(rf"{module}\.((weight|bias)_delta(_support|_shape)?|num_steps)", key) for key in keys)
    assert [key for key in keys if "steps" in key] == ["base_model.model.layers.0.up.graddrop_adapter.num_steps"]


def test_saving_leaves_the_model_as_it_is(model, tmp_path):
    model.peft_config["default"].save_density = 0.1
    fill(deltas(model)["layers.0.up.weight"], 64)
    before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
    model.save_pretrained(tmp_path)
    assert all(torch.equal(deltas(model)[name], delta) for name, delta in before.items())


@pytest.mark.parametrize("sparse", [False, True])
def test_other_modules_are_saved_in_full(tmp_path, sparse):
    """Also where they are mostly zeros, as a fresh head's bias is."""
    model = dropped(bert(), modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in model.base_model.model.classifier.modules_to_save["default"].parameters():
            parameter.zero_() if sparse else parameter.normal_()
    tensors = saved(model, tmp_path)
    assert {tuple(t.shape) for key, t in tensors.items() if "classifier" in key} == {(2, 32), (2,)}
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model))


def test_configuration_file_lists_the_targets_that_were_found(tmp_path):
    model = dropped(layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 9
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert graddrop_layers(loaded).keys() == graddrop_layers(model).keys()
