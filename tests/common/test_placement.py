"""Adapters on weights that accelerate has offloaded to the CPU or a disk."""

from __future__ import annotations

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import llama, logits, train

from peft_sparsegrad import GradDropConfig, SparseGradConfig

LINEAR = r".*_proj"
METHODS = {
    "SparseGrad": lambda **settings: SparseGradConfig(density=0.05, warmup_steps=0, **settings),
    "a basis of the weights": lambda **settings: SparseGradConfig(
        density=0.05, basis="svd", warmup_steps=2, **settings
    ),
    "GradDrop": lambda **settings: GradDropConfig(target_modules=LINEAR, **settings),
}


def offloaded(where, folder):
    model = llama()
    accelerate.cpu_offload(model) if where == "cpu" else accelerate.disk_offload(model, folder)
    return model


def last_block_on_disk(folder):
    """The model as `from_pretrained` loads it with a `device_map`."""
    llama().save_pretrained(folder / "base")
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    places = {**dict.fromkeys([*parts, "model.layers.0", "model.layers.1"], "cpu"), "model.layers.2": "disk"}
    return type(llama()).from_pretrained(folder / "base", device_map=places, offload_folder=folder / "offload")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_adapter_that_is_to_be_trained_on_offloaded_weights(where, method, tmp_path):
    model = offloaded(where, tmp_path)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.\w+\.\w+_proj' is offloaded, .* without offloading"):
        get_peft_model(model, METHODS[method]())
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_block_on_disk_is_refused_and_can_be_left_out(method, tmp_path):
    model = last_block_on_disk(tmp_path)
    with pytest.raises(ValueError, match=r"'model\.layers\.2\..* is offloaded, .*`exclude_modules`"):
        get_peft_model(model, METHODS[method]())
    settings = {"exclude_modules": r".*layers\.2\..*"}
    losses = []
    for base in (model, llama()):
        torch.manual_seed(1)
        losses.append(train(get_peft_model(base, METHODS[method](**settings)).train()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_saved_adapter_on_offloaded_weights(where, method, tmp_path):
    trained = get_peft_model(llama(), METHODS[method]())
    train(trained.train())
    trained.save_pretrained(tmp_path / "adapter")
    assert not torch.allclose(logits(trained), logits(llama()), atol=1e-2)
    loaded = PeftModel.from_pretrained(offloaded(where, tmp_path / "offload"), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(trained), atol=1e-5)
    with pytest.raises(ValueError, match="is offloaded"):
        PeftModel.from_pretrained(offloaded(where, tmp_path / "offload"), tmp_path / "adapter", is_trainable=True)
