"""GradDrop in TRL's SFTTrainer: `peft_config` and the callback."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny import llama, logits, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_sparsegrad import GradDropCallback, GradDropConfig, GradDropLayer

trl = pytest.importorskip("trl")
TEXTS = [" ".join(f"t{3 + (i * step) % 60}" for step in range(12)) for i in range(1, 41)]


def sft(model, path, variant="GradDrop-Epoch", lora=False, **settings):
    config = GradDropConfig.from_variant(variant, task_type="CAUSAL_LM")
    arguments = trl.SFTConfig(
        str(path), num_train_epochs=3, per_device_train_batch_size=4, learning_rate=0.01, logging_steps=10,
        report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, max_length=32, save_strategy="no", **settings,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if lora else config,
        callbacks=[GradDropCallback(config if lora else None)],
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


def deltas(model):
    return {
        masked.name: masked.parameter
        for layer in model.modules()
        if isinstance(layer, GradDropLayer)
        for masked in layer.masked_parameters()
    }


def quantized(path):
    llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@pytest.mark.parametrize(
    ("variant", "gradient_checkpointing"),
    [
        ("GradDrop", False),
        ("Layer-GradDrop", True),
        pytest.param("Layer-GradDrop", False, marks=pytest.mark.slow),
        pytest.param("GradDrop-Epoch", True, marks=pytest.mark.slow),
    ],
)
def test_trains_saves_and_reloads(tmp_path, variant, gradient_checkpointing):
    trainer = sft(llama(), tmp_path, variant, gradient_checkpointing=gradient_checkpointing)
    assert_has_learned(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(trainer.model))


@pytest.mark.parametrize("lora", [False, True])
def test_logs_how_much_has_moved(tmp_path, lora):
    trainer = sft(llama(), tmp_path, lora=lora)
    moved = [entry["graddrop_moved"] for entry in trainer.state.log_history if "graddrop_moved" in entry]
    assert moved == pytest.approx([1 / 3, 2 / 3, 1], abs=0.02)


def test_quantized_base_learns(tmp_path):
    pytest.importorskip("bitsandbytes")
    assert_has_learned(sft(quantized(tmp_path / "base"), tmp_path / "out").model)


@pytest.mark.parametrize("of", ["norm", "proj"])
def test_quantized_base_keeps_float32_deltas(tmp_path, of):
    """TRL casts all that trains to bf16, which has no room for small updates."""
    pytest.importorskip("bitsandbytes")
    model = sft(quantized(tmp_path / "base"), tmp_path / "out", "GradDrop", max_steps=2).model
    chosen = {name: delta for name, delta in deltas(model).items() if of in name}
    assert chosen
    assert {delta.dtype for delta in chosen.values()} == {torch.float32}
    assert all(delta.requires_grad for delta in chosen.values())
