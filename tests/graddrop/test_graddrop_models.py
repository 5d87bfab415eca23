"""Models of many kinds train with GradDrop, offloaded ones and those with another adapter too."""

import accelerate
import pytest
import torch
from block_models import albert, distilbert, gpt2, mixtral, roberta, vit
from graddrop_tools import deltas, dropped, graddrop_layers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import batch, bert, llama

from peft_sparsegrad import GradDropConfig


def test_embedding_trains_on_request():
    model = dropped(target_modules=["embed_tokens", "q_proj"], p=0.0)
    assert "model.embed_tokens" in graddrop_layers(model)
    ids = batch()["input_ids"]
    model(ids).logits.square().sum().backward()
    gradient = deltas(model)["model.embed_tokens.weight"].grad
    seen = ids.unique()
    assert gradient[seen].any(1).all()
    assert gradient.any(1).sum() == len(seen)


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
