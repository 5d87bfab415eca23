"""TRL's SFTTrainer with nothing but `peft_config`."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import llama, logits, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_sparsegrad import SparseGradCallback, SparseGradConfig, SparseGradLinear

trl = pytest.importorskip("trl")
TEXTS = [" ".join(f"t{3 + (i * step) % 60}" for step in range(12)) for i in range(1, 41)]


def sft(model, path, callbacks=(), **settings):
    arguments = trl.SFTConfig(
        str(path), max_steps=40, per_device_train_batch_size=4, learning_rate=0.05, logging_steps=5, report_to=[],
        disable_tqdm=True, use_cpu=True, bf16=False, max_length=32, save_strategy="no", **settings,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer(),
        peft_config=SparseGradConfig(density=0.3, warmup_steps=4, task_type="CAUSAL_LM"), callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_has_learned(model):
    """The adapter lowers the loss on what it was trained on."""
    data = tokenizer()(TEXTS, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=data["input_ids"], labels=data["input_ids"]).loss
        with model.disable_adapter():
            base_loss = model(input_ids=data["input_ids"], labels=data["input_ids"]).loss
    assert loss < base_loss - 0.05


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
@pytest.mark.parametrize("warm_up", ["nothing called", "callback"])
def test_trains_saves_and_reloads(tmp_path, warm_up, gradient_checkpointing):
    callbacks = [SparseGradCallback(steps=3)] if warm_up == "callback" else []
    trainer = sft(llama(), tmp_path, callbacks, gradient_checkpointing=gradient_checkpointing)
    assert_has_learned(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_quantized_base_keeps_float32_values(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    trainer = sft(base, tmp_path / "out")
    assert_has_learned(trainer.model)
    layers = [module for module in trainer.model.modules() if isinstance(module, SparseGradLinear)]
    assert {layer.adapter("default").values.dtype for layer in layers} == {torch.float32}
