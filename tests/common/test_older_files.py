"""Files that an earlier release has written, in `tests/data`, load as they did and are saved in the present form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import adapted, llama, train

from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.sparsegrad.layer import layer_adapters

FORMAT_1 = Path(__file__).parents[1] / "data" / "format_1"
SPARSEGRAD = ["hosvd", "wide", "columns"]  # supports as bit masks, and of "wide" as int32 positions
ADAPTERS = [*SPARSEGRAD, "graddrop", "graddrop_sparse"]


def deltas(model) -> dict[str, torch.Tensor]:
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items() if name.endswith("proj")}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_of_format_1_has_the_deltas_that_it_had_and_keeps_them_when_it_is_saved_again(tmp_path, name):
    expected = load_file(FORMAT_1 / name / "deltas.safetensors")
    model = PeftModel.from_pretrained(llama(), FORMAT_1 / name)
    check_equal(deltas(model), expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == 3
    check_equal(deltas(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    before, after = (each / "adapter_model.safetensors" for each in (FORMAT_1 / name, tmp_path))
    assert after.stat().st_size < before.stat().st_size


@pytest.mark.parametrize("name", SPARSEGRAD)
def test_adapter_of_format_1_trains_on(name):
    model = PeftModel.from_pretrained(llama(), FORMAT_1 / name, is_trainable=True).train()
    losses = train(model, 5)
    assert losses[4] < losses[0]


def test_state_dict_of_an_earlier_release_is_loaded_by_torch():
    """A checkpoint of a whole model, which does not pass through PEFT's loading."""
    model = PeftModel.from_pretrained(llama(), FORMAT_1 / "hosvd")
    older = model.state_dict()
    for key, tensor in load_file(FORMAT_1 / "hosvd" / "adapter_model.safetensors").items():
        if key.endswith("support"):
            older[key.replace(".support", ".default.support")] = tensor
    other = get_peft_model(llama(), SparseGradConfig.from_pretrained(FORMAT_1 / "hosvd"))
    other.load_state_dict(older)
    check_equal(deltas(other), load_file(FORMAT_1 / "hosvd" / "deltas.safetensors"))


@pytest.mark.parametrize("name", ["hosvd", "wide"])
def test_damaged_support_of_format_1_is_refused(tmp_path, name):
    tensors = load_file(FORMAT_1 / name / "adapter_model.safetensors")
    support = next(key for key in tensors if key.endswith("up_proj.sparsegrad_adapter.support"))
    tensors[support].zero_()
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((FORMAT_1 / name / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=r"up_proj.*support'.*(has 0 entries|sorted, unique).*damaged"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_transition_matrices_of_format_1_are_used():
    path = FORMAT_1 / "transition_matrices.safetensors"
    settings = {"slack": 6, "rank": "narrower", "layers_to_transform": [0], "transition_matrices": str(path)}
    model = adapted(target_modules=["up_proj", "down_proj"], warmup_steps=8, **settings)
    adapters = layer_adapters(model, "default")
    tensors = load_file(path)
    assert all(adapter.is_settled for adapter in adapters)
    sides = [side for adapter in adapters for side in (adapter.basis.U, adapter.basis.V) if side is not None]
    assert all(any(torch.equal(side, each) for each in tensors.values() if each.is_floating_point()) for side in sides)


@pytest.mark.parametrize("settings", [{"rank": "auto"}, {"rank": 20, "rank_pattern": {"down_proj": "auto"}}])
def test_auto_in_format_2_is_the_narrower_side(tmp_path, settings):
    """Where today's `"auto"` would ask for other matrices than the file has."""
    narrower = (
        {"rank": "narrower"} if settings["rank"] == "auto" else {**settings, "rank_pattern": {"down_proj": "narrower"}}
    )
    model = adapted(warmup_steps=2, slack=6, **narrower)
    train(model, 4)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings, "format_version": 2}))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    check_equal(deltas(loaded), deltas(model))
    assert {adapter.plan.ranks for adapter in layer_adapters(loaded, "default")} == {
        adapter.plan.ranks for adapter in layer_adapters(model, "default")
    }
