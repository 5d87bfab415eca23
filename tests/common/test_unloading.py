"""Unloading a model whose adapter also trains tokens or a head, against LoRA where that may differ."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import batch, llama, logits, train
from torch import nn
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForSequenceClassification

from peft_sparsegrad import GradDropConfig, SparseGradConfig

CONFIGS = {
    "lora": lambda **settings: LoraConfig(target_modules=["up_proj", "query"], **settings),
    "sparsegrad": lambda **settings: SparseGradConfig(density=0.05, warmup_steps=0, **settings),
    "graddrop": lambda **settings: GradDropConfig(p=0.2, **settings),
}
ROBERTA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("way", ["merge", "safe merge", "unload"])
def test_a_model_with_trained_tokens_is_unloaded_and_saved(method, tied, way, tmp_path):
    base = llama(tie_word_embeddings=tied)
    before = logits(base)
    model = get_peft_model(base, CONFIGS[method](task_type="CAUSAL_LM", trainable_token_indices=[3, 4]))
    train(model.train(), steps=2)
    expected = before if way == "unload" else logits(model)
    plain = model.unload() if way == "unload" else model.merge_and_unload(safe_merge=way == "safe merge")
    assert isinstance(plain.get_input_embeddings().weight, nn.Parameter)
    assert (plain.get_input_embeddings().weight is plain.lm_head.weight) == tied
    plain.save_pretrained(tmp_path)
    for each in (plain, AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(logits(each), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_head_of_several_layers_is_unloaded(method):
    base = RobertaForSequenceClassification(RobertaConfig(vocab_size=64, **ROBERTA))
    model = get_peft_model(base, CONFIGS[method](task_type="SEQ_CLS", modules_to_save=["classifier"]))
    given = {"input_ids": batch()["input_ids"][:, :8]}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model.train()(**given, labels=torch.tensor([0, 1] * 4)).loss.backward()
    optimizer.step()
    expected = model.eval()(**given).logits
    merged = model.merge_and_unload()
    assert not any("modules_to_save" in name or "base_layer" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(**given).logits, expected, rtol=1e-5, atol=1e-5)
