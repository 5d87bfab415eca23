"""TRL's SFTTrainer with nothing but `peft_config`."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import llama, logits, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForSequenceClassification

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


@pytest.mark.parametrize(
    ("warm_up", "gradient_checkpointing"),
    [
        ("nothing called", True),
        ("callback", False),
        pytest.param("nothing called", False, marks=pytest.mark.slow),
        pytest.param("callback", True, marks=pytest.mark.slow),
    ],
)
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
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    trainer = sft(base, tmp_path / "out")
    assert_has_learned(trainer.model)
    layers = [module for module in trainer.model.modules() if isinstance(module, SparseGradLinear)]
    assert {layer.adapter("default").values.dtype for layer in layers} == {torch.float32}


# The warm-up looks at the loss that is trained -----------------------------------------------------------------------

PREFERENCES = [
    {"prompt": f"t{i} t{i + 1}", "chosen": f" t{i + 2} t{i + 3}", "rejected": f" t{i + 30} t{i + 9}"}
    for i in range(4, 20)
]
ANSWERS = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PREFERENCES)
]
COMMON = {
    "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 1, "report_to": [],
    "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no",
}  # fmt: skip


def length_reward(completions, **kwargs):
    return [float(len(set(each.split()))) for each in completions]


def trainer_of_kind(kind, path, callbacks):
    config = SparseGradConfig(density=0.3, warmup_steps=4, task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM")
    settings = dict(COMMON)
    extra = {"train_dataset": Dataset.from_list(ANSWERS if kind == "KTO" else PREFERENCES)}
    base = llama()
    if kind == "GRPO":
        settings |= {"num_generations": 4, "max_completion_length": 6, "temperature": 2.0}
        extra = {"train_dataset": Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES]),
                 "reward_funcs": length_reward}  # fmt: skip
    if kind == "Reward":
        base.config.num_labels = 1
        base = LlamaForSequenceClassification(base.config)
    arguments = getattr(trl, f"{kind}Config")(str(path), **settings)
    return getattr(trl, f"{kind}Trainer")(
        base, args=arguments, processing_class=tokenizer(), peft_config=config, callbacks=callbacks, **extra
    )


@pytest.mark.parametrize("kind", ["DPO", "Reward", "KTO", "GRPO"])
def test_callback_warms_up_in_trls_trainers(tmp_path, kind, caplog):
    callback = SparseGradCallback(steps=2)
    trainer = trainer_of_kind(kind, tmp_path, [callback])
    trainer.train()
    assert ("observes the first 2 passes" in caplog.text) == (kind == "GRPO"), "GRPO makes its batches as it trains"
    assert callback.report.passes == 2
    layers = [module.adapter("default") for module in trainer.model.modules() if isinstance(module, SparseGradLinear)]
    assert all(layer.is_settled and layer.values.any() for layer in layers)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6


def test_first_log_is_not_that_of_the_warm_up(tmp_path):
    """TRL averages metrics since the last log; those of the warm-up's passes are none of the run's."""
    logs = []
    for callbacks in ([SparseGradCallback(steps=3)], []):
        trainer = trainer_of_kind("DPO", tmp_path, callbacks)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["num_tokens"] == logs[1]["num_tokens"]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"])
