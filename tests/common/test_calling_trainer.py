"""What the Trainer makes of an adapter: its own model card, its trackers, what it uploads to the hub."""

import shutil
from pathlib import Path

import pytest
import transformers.trainer
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import llama, logits, rows, tokenizer
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_sparsegrad import GradDropCallback, GradDropConfig, SparseGradCallback, SparseGradConfig

CONFIGS = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]),
    "SparseGrad": SparseGradConfig(density=0.05, warmup_steps=2, task_type="CAUSAL_LM"),
    "GradDrop": GradDropConfig(save_density=0.5, task_type="CAUSAL_LM"),
}
SETTINGS = {"max_steps": 4, "learning_rate": 0.05, "report_to": [], "disable_tqdm": True, "use_cpu": True}


def trained(method, path, kind=Trainer, callbacks=(), **settings):
    llama().save_pretrained(path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(path / "base"), CONFIGS[method])
    settings = {**SETTINGS, "output_dir": str(path / "out"), **settings}
    if kind is SFTTrainer:
        made = kind(model, SFTConfig(**settings), train_dataset=sft_rows(), processing_class=tokenizer())
    else:
        made = kind(model, TrainingArguments(**settings), train_dataset=rows(8), callbacks=list(callbacks))
    made.train()
    return made


def sft_rows():
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows(8)])


def card_of(trainer):
    return Path(trainer.args.output_dir, "README.md").read_text("utf-8")


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("method", ["SparseGrad", "GradDrop"])
def test_card_of_the_trainer_keeps_what_an_adapter_needs_to_load(tmp_path, method, kind):
    trainer = trained(method, tmp_path, kind)
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card(model_name="tuned")
        trainer.save_model()
        trainer.create_model_card(model_name="tuned")
        card = card_of(trainer)
        assert "tuned" in card.split("## ")[0], "the Trainer's own card"
        assert card.count("import peft_sparsegrad  # of the package peft-sparsegrad") == 1
        assert card.count(f"## {method} adapter") == 1
        assert card.count("## What was left out of this file") == (method == "GradDrop")
        assert card.index("import peft_sparsegrad") < card.index("## Training procedure")


def test_card_of_a_trainer_of_another_adapter_has_none_of_it(tmp_path):
    trainer = trained("LoRA", tmp_path)
    trainer.save_model()
    trainer.create_model_card()
    assert "peft_sparsegrad" not in card_of(trainer)
    assert "create_model_card" not in vars(trainer)


class Tracker(TrainerCallback):
    """Keeps each log as it is when a tracker's turn comes, which is before that of callbacks that a user adds."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


FIGURES = {
    "SparseGrad": {"sparsegrad_energy_in_core", "sparsegrad_energy_in_support"},
    "GradDrop": {"graddrop_rate", "graddrop_active", "graddrop_moved"},
}


def ours(method):
    return SparseGradCallback(steps=2) if method == "SparseGrad" else GradDropCallback()


@pytest.mark.parametrize("method", ["SparseGrad", "GradDrop"])
def test_figures_reach_trackers_and_the_history_in_every_run(tmp_path, method):
    tracker = Tracker()
    run = trained(method, tmp_path, callbacks=[tracker, ours(method)], logging_steps=2, save_strategy="no")
    run.train()
    logs = [log for log in tracker.logs if "loss" in log]
    assert len(logs) == 4
    assert all(FIGURES[method] <= set(log) for log in logs)
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert [{**log, "step": entry["step"]} for log, entry in zip(logs[2:], history, strict=True)] == history


def test_figures_of_both_methods_reach_trackers(tmp_path):
    tracker, masks = Tracker(), GradDropCallback(GradDropConfig(p=0.5, seed=1))
    callbacks = [tracker, ours("SparseGrad"), masks]
    trained("SparseGrad", tmp_path, callbacks=callbacks, logging_steps=2, save_strategy="no")
    logs = [log for log in tracker.logs if "loss" in log]
    assert len(logs) == 2
    assert all(FIGURES["SparseGrad"] | FIGURES["GradDrop"] <= set(log) for log in logs)


@pytest.mark.parametrize("method", ["SparseGrad", "GradDrop"])
def test_figures_are_in_the_event_files_of_tensorboard(tmp_path, method):
    settings = {"logging_steps": 2, "save_strategy": "no", "report_to": ["tensorboard"]}
    trained(method, tmp_path, callbacks=[ours(method)], **settings)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file.parent)).Reload()
    assert {f"train/{name}" for name in FIGURES[method]} <= set(found.Tags()["scalars"])


class Upload:
    """Stands in for the hub, which tests cannot reach: what the Trainer uploads is copied into a folder."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, folder_path, ignore_patterns, **kwargs):
        shutil.copytree(folder_path, self.folder, ignore=shutil.ignore_patterns(*ignore_patterns))


def push(trainer, monkeypatch, folder):
    upload = Upload(folder)
    for module in (HfApi, transformers.trainer):
        for name in ("create_repo", "upload_folder"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, staticmethod(getattr(upload, name)))
    trainer.push_to_hub()


@pytest.mark.parametrize("method", ["LoRA", "SparseGrad", "GradDrop"])
def test_what_is_pushed_loads_by_its_name_on_the_hub(tmp_path, monkeypatch, method):
    trainer = trained(method, tmp_path, hub_model_id="me/tuned", save_strategy="no")
    snapshot = tmp_path / "cache" / "models--me--tuned" / "snapshots" / "0123"
    push(trainer, monkeypatch, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)

    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, "me/tuned", cache_dir=str(tmp_path / "cache"))
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), snapshot)
    assert logits(loaded).equal(logits(expected))
    if method != "LoRA":
        code = (snapshot / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(snapshot)
        exec(code, names := {})
        assert logits(names["model"]).equal(logits(expected))
