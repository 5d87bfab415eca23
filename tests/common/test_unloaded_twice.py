"""An adapter that was loaded for inference, and a model from which the adapters have been unloaded."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import adapted, batch, llama, logits

from peft_sparsegrad import GradDropConfig, SparseGradConfig, create_sparsegrad_optimizer, warmup

OURS = {
    "sparsegrad": SparseGradConfig(task_type="CAUSAL_LM", init_weights=False),
    "graddrop": GradDropConfig(task_type="CAUSAL_LM", init_weights=False),
}
ALL = {**OURS, "lora": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)}


@pytest.mark.parametrize("method", ALL)
def test_merging_twice_is_said_and_changes_nothing(method, tmp_path):
    model = get_peft_model(llama(num_hidden_layers=1), ALL[method])
    once = logits(model.merge_and_unload())
    if method == "lora":  # which says nothing
        assert torch.equal(logits(model.merge_and_unload()), once)
        return
    with pytest.warns(UserWarning, match="Nothing to merge: the adapters have been unloaded already"):
        assert torch.equal(logits(model.merge_and_unload()), once)
    with pytest.raises(ValueError, match=r"its file would be empty: .*save the model that they return"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_adapter_loaded_for_inference_is_refused_with_the_way_to_train_it(tmp_path):
    adapted(llama(num_hidden_layers=1), init_weights=False).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path)
    for refused in (lambda: create_sparsegrad_optimizer(loaded, 1e-3), lambda: warmup(loaded, [batch()] * 2)):
        with pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(base, path, is_trainable=True\)"):
            refused()
    trainable = PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path, is_trainable=True)
    assert create_sparsegrad_optimizer(trainable, 1e-3).param_groups


def test_an_optimizer_for_a_model_without_an_adapter_of_the_method():
    for model in (llama(), get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))):
        with pytest.raises(ValueError, match=r"call `get_peft_model\(model, SparseGradConfig\(...\)\)` first"):
            create_sparsegrad_optimizer(model, 1e-3)
