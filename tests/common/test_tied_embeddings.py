"""An embedding and an output layer that are one tensor: trained, saved, loaded and merged as one, as with LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import llama, logits, train

from peft_sparsegrad import GradDropConfig, SparseGradConfig

CONFIGS = {
    "lora": lambda **settings: LoraConfig(target_modules=["up_proj"], **settings),
    "sparsegrad": lambda **settings: SparseGradConfig(density=0.05, warmup_steps=0, **settings),
    "graddrop": lambda **settings: GradDropConfig(p=0.2, target_modules=["up_proj"], **settings),
}


def adapted(method, **settings):
    config = CONFIGS[method](task_type="CAUSAL_LM", ensure_weight_tying=True, **settings)
    return get_peft_model(llama(tie_word_embeddings=True), config)


def assert_is_the_same_when_loaded_and_merged(model, path):
    model.save_pretrained(path)
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=True), path)
    assert torch.equal(logits(loaded), logits(model))
    plain = loaded.merge_and_unload()
    assert plain.get_input_embeddings().weight is plain.lm_head.weight
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to_save", [["embed_tokens"], ["lm_head", "embed_tokens"], ["embed_tokens", "norm"]])
@pytest.mark.parametrize("method", CONFIGS)
def test_an_embedding_that_trains_stays_tied(method, to_save, tmp_path, recwarn):
    model = adapted(method, modules_to_save=to_save)
    assert not [each for each in recwarn if "tie" in str(each.message)]
    before = model.get_input_embeddings().weight.detach().clone()
    train(model.train(), steps=3)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.modules_to_save["default"].weight is model.get_input_embeddings().weight
        assert not torch.equal(layer.weight, before)
    assert_is_the_same_when_loaded_and_merged(model, tmp_path)


@pytest.mark.parametrize("method", CONFIGS)
def test_tokens_that_train_stay_tied(method, tmp_path):
    model = adapted(method, trainable_token_indices=[3, 4])
    train(model.train(), steps=3)
    assert_is_the_same_when_loaded_and_merged(model, tmp_path)


def test_adapters_on_a_tied_embedding_are_refused_before_anything_changes():
    base = llama(tie_word_embeddings=True)
    names = [name for name, _ in base.named_modules()]
    config = GradDropConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM", ensure_weight_tying=True)
    with pytest.raises(ValueError, match="`target_modules` names an embedding that is tied to lm_head: name it in"):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names
