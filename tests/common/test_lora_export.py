"""A converted adapter in servers: one rank, one scale, and what a lower rank does to the output."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peft_sparsegrad import GradDropConfig, SparseGradConfig, convert_to_lora
from peft_sparsegrad.common.delta_layer import DeltaLayer

MLP = ["gate_proj", "up_proj", "down_proj"]
CONVERTED = {
    "sparsegrad": SparseGradConfig(warmup_steps=0, init_weights=False),
    "several ranks": SparseGradConfig(
        target_modules=["q_proj", "up_proj"],
        density_pattern={"0.mlp.up_proj": 0.2},
        basis="svd",
        warmup_steps=0,
        init_weights=False,
    ),
    "graddrop": GradDropConfig(target_modules=["q_proj", "down_proj"], init_weights=False),
}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=tiny.VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=16))


@pytest.fixture(scope="module", params=CONVERTED)
def exported(request, tmp_path_factory):
    """A model with an adapter and the folder of an exact LoRA adapter made of it."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), CONVERTED[request.param])
    folder = tmp_path_factory.mktemp("lora")
    convert_to_lora(model, rank=32 if request.param == "graddrop" else None).save(folder)
    return model, folder


def test_llama_cpp_s_rule_gives_the_same_outputs(exported):
    """`convert_lora_to_gguf.py` reads r from each tensor and lora_alpha from the configuration, and no pattern."""
    model, folder = exported
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    base = tiny.llama()
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith("lora_A.weight"):
                b = tensors[name.replace("lora_A", "lora_B")]
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                base.get_submodule(module).weight += alpha / a.shape[0] * b @ a
    expected = tiny.logits(model)
    assert (expected - tiny.logits(tiny.llama())).abs().max() > 0.05, "the adapter must matter"
    torch.testing.assert_close(tiny.logits(base), expected, rtol=1e-5, atol=1e-5)


def test_peft_gives_the_same_outputs(exported):
    model, folder = exported
    loaded = PeftModel.from_pretrained(tiny.llama(), folder)
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), rtol=1e-5, atol=1e-5)


def test_all_tensors_have_one_rank_and_the_configuration_no_patterns(exported):
    _, folder = exported
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = {min(tensor.shape) for tensor in load_file(folder / "adapter_model.safetensors").values()}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]


def test_file_is_as_large_as_it_says(tmp_path):
    conversion = convert_to_lora(get_peft_model(tiny.llama(), CONVERTED["sparsegrad"]), rank=2)
    conversion.save(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size - 8192 < conversion.num_bytes < size


def trained(**settings) -> PeftModel:
    model = get_peft_model(tiny.llama(), GradDropConfig(**settings))
    tiny.train(model, steps=4, lr=0.01)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_graddrop_gets_the_best_factors_of_a_rank(kind):
    targets, base = (["down_proj", "gate_proj"], tiny.llama()) if kind == "llama" else (["c_fc", "c_proj"], gpt2())
    model = get_peft_model(base, GradDropConfig(target_modules=targets, init_weights=False))
    conversion = convert_to_lora(model, rank=3, linear_only=kind == "gpt2")
    layers = {name: m for name, m in base.named_modules() if hasattr(m, "get_delta_weight")}
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").double()
        delta = delta.T if kind == "gpt2" else delta
        a, b = (conversion.state_dict[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
        singular_values = torch.linalg.svdvals(delta)
        best = (singular_values[3:].norm() / singular_values.norm()).item()
        assert conversion.errors[name] == pytest.approx(best, rel=1e-5)
        assert ((delta - b @ a).norm() / delta.norm()).item() == pytest.approx(best, rel=1e-5)


def test_graddrop_needs_a_rank():
    with pytest.raises(ValueError, match=r"`rank` must be given .* of full rank.*rank=16"):
        convert_to_lora(trained(target_modules=MLP))


def test_what_lora_cannot_hold_is_refused_or_counted_as_lost():
    model = trained(target_modules=["up_proj", "input_layernorm"])
    with pytest.raises(ValueError, match=r"the changes of 3 .*layers.0.input_layernorm.*`linear_only=True`"):
        convert_to_lora(model, rank=4)
    conversion = convert_to_lora(model, rank=32, linear_only=True)
    assert conversion.errors["model.layers.1.input_layernorm"] == conversion.largest_error == 1
    assert conversion.errors["model.layers.1.mlp.up_proj"] < 1e-5
    assert not any("layernorm" in name for name in conversion.state_dict)


def test_biases_that_trained_are_named():
    model = get_peft_model(gpt2(), GradDropConfig(target_modules=["c_fc"], init_weights=False))
    with pytest.raises(ValueError, match=r"2 biases and modules.*'transformer.h.0.mlp.c_fc.bias'"):
        convert_to_lora(model, rank=4)


@pytest.mark.parametrize("method", ["sparsegrad", "graddrop"])
def test_change_of_the_output_is_that_of_the_loaded_adapter(method, tmp_path):
    model = get_peft_model(tiny.llama(), CONVERTED[method]).train()
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    conversion = convert_to_lora(model, rank=2, batch=tiny.batch())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(module.training for module in model.modules())
    conversion.save(tmp_path)
    with torch.no_grad():
        base, ours = tiny.llama().eval()(**tiny.batch()), model.eval()(**tiny.batch())
        lora = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()(**tiny.batch())
    change = conversion.output_change
    losses = (change.loss_base, change.loss_adapter, change.loss_lora)
    assert losses == pytest.approx([out.loss.item() for out in (base, ours, lora)], rel=1e-5)
    lost, effect = (ours.logits - lora.logits).norm(), (ours.logits - base.logits).norm()
    assert change.relative == pytest.approx((lost / effect).item(), rel=1e-4)
    assert 0.01 < change.relative < 2


def test_change_of_the_output_is_of_the_named_adapter_alone():
    model = get_peft_model(tiny.llama(), CONVERTED["sparsegrad"])
    expected = convert_to_lora(model, rank=2, batch=tiny.batch()).output_change
    model.add_adapter("other", SparseGradConfig(warmup_steps=0, init_weights=False))
    model.set_adapter("other")
    assert convert_to_lora(model, rank=2, batch=tiny.batch()).output_change == expected
    assert model.active_adapters == ["other"]


def test_batch_without_labels_has_a_change_and_no_losses():
    batch = {"input_ids": tiny.batch()["input_ids"]}
    change = convert_to_lora(get_peft_model(tiny.llama(), CONVERTED["sparsegrad"]), rank=2, batch=batch).output_change
    assert change.relative > 0
    assert change.loss_lora is None


def test_merged_adapter_has_no_output_without_it():
    model = get_peft_model(tiny.llama(), CONVERTED["sparsegrad"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"`batch`.*merged: call `unmerge_adapter`"):
        convert_to_lora(model, rank=2, batch=tiny.batch())


@pytest.mark.parametrize("method", ["sparsegrad", "graddrop"])
def test_scale_of_an_adapter_is_in_the_factors(method, tmp_path):
    model = get_peft_model(tiny.llama(), CONVERTED[method])
    for layer in model.modules():
        if isinstance(layer, DeltaLayer):
            layer.set_scale("default", 0.3)
    convert_to_lora(model, rank=32).save(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), rtol=1e-5, atol=1e-5)


def test_lora_itself_is_not_converted():
    with pytest.raises(ValueError, match="no SparseGrad or GradDrop adapter"):
        convert_to_lora(get_peft_model(tiny.llama(), LoraConfig(target_modules=MLP)), rank=2)
