"""Adapters on base models whose weights are loaded afterwards, and adapters that are loaded afterwards themselves."""

from __future__ import annotations

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import llama, logits, train

from peft_sparsegrad import GradDrop, GradDropConfig, SparseGradConfig

OURS = {
    "after the warm-up": lambda: SparseGradConfig(density=0.05, warmup_steps=0, renewal_steps=2),
    "warm-up": lambda: SparseGradConfig(density=0.05, warmup_steps=2, renewal_steps=2),
    "dynamic": lambda: SparseGradConfig(density=0.05, warmup_steps=0, support="dynamic"),
    "identity": lambda: SparseGradConfig(density=0.05, warmup_steps=0, basis="identity"),
    "graddrop": lambda: GradDropConfig(p=0.2),
}
ALL = {"lora": lambda: LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False), **OURS}


def small():
    return llama(num_hidden_layers=1)


def on_meta():
    with torch.device("meta"):
        return small()


def real(method):
    torch.manual_seed(0)
    return get_peft_model(small(), ALL[method]())


def load_base(model):
    """Put the base model's weights, and the buffers that no checkpoint holds, in place of those on the meta device."""
    base = small()
    names = {name.replace(".base_layer", "").removeprefix("base_model.model."): name for name in model.state_dict()}
    weights = {names[name]: tensor for name, tensor in base.state_dict().items()}
    assert not model.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    rotary, loaded = (each.get_submodule("model.rotary_emb") for each in (model.get_base_model(), base))
    rotary.inv_freq, rotary.original_inv_freq = loaded.inv_freq, loaded.original_inv_freq


@pytest.mark.parametrize("method", OURS)
def test_a_base_that_is_loaded_after_the_adapter_is_added(method):
    model = get_peft_model(on_meta(), OURS[method]())
    load_base(model)
    assert train(model.train(), steps=5) == train(real(method).train(), steps=5)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("all_on_meta", [False, True])
def test_a_model_without_data_that_is_given_memory_and_loaded(method, all_on_meta):
    with torch.device("meta" if all_on_meta else "cpu"):
        model = get_peft_model(on_meta(), ALL[method]())
    model.to_empty(device="cpu")
    load_base(model)
    twin = real(method)
    set_peft_model_state_dict(model, get_peft_model_state_dict(twin))
    assert train(model.train(), steps=5) == train(twin.train(), steps=5)


@pytest.mark.parametrize("method", OURS)
def test_a_saved_adapter_on_a_base_that_is_loaded_afterwards(method, tmp_path):
    trained = real(method)
    train(trained, steps=4)
    trained.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(on_meta(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        load_base(model)
        assert torch.equal(logits(model), logits(trained))
        further = PeftModel.from_pretrained(
            small(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
        ).train()
        again = PeftModel.from_pretrained(small(), tmp_path, is_trainable=True).train()
        assert train(further, steps=4) == train(again, steps=4)


@pytest.mark.parametrize("method", ALL)
def test_an_adapter_that_is_injected_without_data_and_loaded(method):
    trained, model = real(method), small()
    train(trained, steps=4)
    inject_adapter_in_model(ALL[method](), model, low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, get_peft_model_state_dict(trained), low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(logits(model), logits(trained))


@pytest.mark.parametrize("method", OURS)
def test_an_adapter_without_data_is_not_trained(method):
    model = get_peft_model(small(), OURS[method](), low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match="on the meta device: load a saved adapter after `low_cpu_mem_usage`"):
        train(model.train(), steps=1)


def test_a_basis_of_weights_that_are_not_there():
    base = on_meta()
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_proj' is on the meta device: load the model"):
        get_peft_model(base, SparseGradConfig(basis="svd", warmup_steps=0))
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


def test_masks_on_parameters_that_loading_replaces():
    with pytest.raises(ValueError, match=r"q_proj\.weight' is on the meta device, .*: load the model before"):
        GradDrop(on_meta(), GradDropConfig())


@pytest.mark.parametrize("method", ALL)
def test_a_model_whose_parameters_are_taken_away_and_given_back(method):
    """As accelerate's FSDP2 does, which shards and loads parameters only."""
    model, twin = real(method), real(method)
    assert train(model.train(), steps=4) == train(twin.train(), steps=4)
    state = model.state_dict()
    model.to("meta")
    names = model.state_dict().keys()
    assert names == dict(model.named_parameters()).keys()
    model.load_state_dict({name: state[name] for name in names}, assign=True)
    load_base(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert train(model, steps=5) == train(twin, steps=5)


@pytest.mark.parametrize("method", OURS)
def test_buffers_are_missed_unless_the_parameters_were_taken_away(method):
    model = real(method)
    model.to("meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(dict(model.named_parameters()))
