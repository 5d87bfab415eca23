"""Ways to load an adapter: PEFT's, transformers' own, as a state dict, in bfloat16, to train on."""

import pytest
import torch
from graddrop_checkpoint_tools import FILE, saved
from graddrop_tools import adamw, deltas, dropped, graddrop_layers, loss_of, masks_of, sgd, step, tower
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import batch, llama, logits, train

from peft_sparsegrad import GradDrop, GradDropConfig


@pytest.fixture(params=["dense", "sparse"])
def trained_and_saved(request, tmp_path):
    model = dropped(variant="GradDrop" if request.param == "dense" else "GradDrop-Epoch-Toggle", num_epochs=3)
    GradDrop(model).set_epoch(0)
    train(model, steps=4, optimizer=adamw(model))
    has_supports = any(key.endswith("_support") for key in saved(model, tmp_path))
    assert has_supports is (request.param == "sparse")
    return model, tmp_path


def test_from_pretrained(trained_and_saved):
    model, path = trained_and_saved
    loaded = PeftModel.from_pretrained(llama(), path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_load_adapter_into_an_existing_name(trained_and_saved):
    model, path = trained_and_saved
    other = dropped(variant="GradDrop", init_weights=False)
    other.load_adapter(path, "default")
    assert torch.equal(logits(other), logits(model))


def test_training_goes_on_after_the_best_adapter_is_loaded_again(trained_and_saved):
    model, path = trained_and_saved
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    train(model, steps=1)
    model.load_adapter(path, "default", is_trainable=True)
    assert all(a is b for a, b in zip([p for p in model.parameters() if p.requires_grad], parameters, strict=True))
    train(model, steps=1)


def test_load_a_second_adapter_and_delete_the_first(trained_and_saved):
    model, path = trained_and_saved
    other = dropped(variant="GradDrop", init_weights=False, seed=4)
    first = logits(other)
    other.load_adapter(path, "second")
    assert torch.equal(logits(other), first)
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))
    other.delete_adapter("default")
    assert torch.equal(logits(other), logits(model))
    assert not any("default" in key for key in other.state_dict())


def test_merge_and_unload_after_loading(trained_and_saved):
    model, path = trained_and_saved
    merged = PeftModel.from_pretrained(llama(), path).merge_and_unload()
    assert not graddrop_layers(merged)
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)


def test_unload_gives_the_base_model_back(trained_and_saved):
    _, path = trained_and_saved
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), path).unload()), logits(llama()))


@pytest.mark.parametrize("prefix", [True, False])
def test_state_dict_with_and_without_pefts_prefix(trained_and_saved, prefix):
    model, _ = trained_and_saved
    tensors = get_peft_model_state_dict(model)
    assert all(key.startswith("base_model.model.") for key in tensors)
    if prefix:
        other = dropped(variant="GradDrop")
        set_peft_model_state_dict(other, tensors)
    else:
        other = llama()
        other.add_adapter(GradDropConfig())
        set_peft_model_state_dict(other, {k.removeprefix("base_model.model."): v for k, v in tensors.items()})
    assert torch.equal(logits(other), logits(model))


def test_trained_and_saved_through_transformers_loads_in_peft(tmp_path):
    model = llama()
    model.add_adapter(GradDropConfig.from_variant("GradDrop", p=0.9))
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    assert any(key.endswith("_support") for key in load_file(tmp_path / FILE))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_transformers_own_loading_takes_full_tensors_and_refuses_sparse_ones(trained_and_saved):
    """It reads the file without asking PEFT: a sparse file must not become a model without its changes."""
    model, path = trained_and_saved
    loaded = llama()
    if any(key.endswith("_support") for key in load_file(path / FILE)):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            loaded.load_adapter(str(path))
    else:
        loaded.load_adapter(str(path))
        assert torch.equal(logits(loaded), logits(model))


def test_bf16_adapter_round_trip(tmp_path):
    config = GradDropConfig(p=0.5)
    model = get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    train(model, steps=1, lr=0.1)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE)
    assert {t.dtype for k, t in stored.items() if not k.endswith(("_support", "_shape", "_steps"))} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())
    assert torch.equal(logits(loaded), logits(model))


def test_adapter_saved_in_float32_loads_on_a_bf16_base_in_float32(tmp_path):
    model = dropped()
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path)
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())


def test_resumed_adapter_draws_the_masks_of_the_saved_settings(tmp_path):
    model = dropped(tower(), variant="Layer-GradDrop", p=0.5, seed=9)
    optimizer = sgd(model)
    for seed in range(3):
        step(model, optimizer, seed)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(), tmp_path, is_trainable=True)
    step(model, optimizer, 3)
    step(loaded, sgd(loaded), 3)
    assert masks_of(model).progress.step == masks_of(loaded).progress.step == 3
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())


def test_loading_for_inference_needs_no_epoch(tmp_path):
    model = dropped(tower(), variant="GradDrop-Epoch")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(), tmp_path)
    assert torch.equal(loss_of(loaded), loss_of(tower()))


def test_loss_of_a_loaded_adapter(trained_and_saved):
    model, path = trained_and_saved
    loaded = PeftModel.from_pretrained(llama(), path)
    with torch.no_grad():
        assert loaded(**batch()).loss == model(**batch()).loss
