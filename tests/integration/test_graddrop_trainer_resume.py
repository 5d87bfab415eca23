"""Trainer runs with GradDrop that are resumed, load their best model, or are saved and loaded."""

import json

import pytest
import torch
from fresh import run_program
from graddrop_trainer_tools import (
    MASKED,
    OTHERS,
    VARIANTS,
    callbacks_for,
    equal,
    graddrop,
    often,
    other,
    trained,
    trainer,
)
from tiny import llama, logits
from transformers import TrainerCallback

from peft_sparsegrad import GradDropCallback, GradDropConfig


class Save(TrainerCallback):
    """In the middle of an epoch, and at an epoch's end."""

    steps = (6, 8)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize("variant", often(VARIANTS, ["GradDrop", "GradDrop-Epoch-Toggle"]))
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, variant):
    def run(path, resume=None):
        model = graddrop(variant)
        trainer(model, path, [GradDropCallback(), Save()]).train(resume_from_checkpoint=resume)
        return trained(model)

    through = run(tmp_path / "through")
    assert all(value.any() for value in through.values())
    for step in Save.steps:
        assert equal(through, run(tmp_path / f"{step}", str(tmp_path / f"through/checkpoint-{step}"))), step


@pytest.mark.parametrize("name", OTHERS)
def test_resumed_run_of_another_model_is_the_uninterrupted_run_bit_for_bit(tmp_path, name):
    def run(path, resume=None):
        model, config = other(name), GradDropConfig.from_variant("GradDrop-Epoch-Toggle")
        trainer(model, path, [*callbacks_for(name, config), Save()]).train(resume_from_checkpoint=resume)
        return trained(model)

    through = run(tmp_path / "through")
    for step in Save.steps:
        assert equal(through, run(tmp_path / f"{step}", str(tmp_path / f"through/checkpoint-{step}"))), step


def test_finished_run_that_is_resumed_does_nothing(tmp_path):
    model = graddrop("GradDrop-Epoch")
    run = trainer(model, tmp_path, [GradDropCallback()], save_strategy="epoch")
    run.train()
    before, steps = trained(model), run.state.global_step
    again = trainer(model, tmp_path, [GradDropCallback()])
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert again.state.global_step == steps
    assert equal(before, trained(model))


BEST = {
    "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3,
    "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": True,  # so that it is not the last one
}  # fmt: skip


def assert_is_best(run):
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.get)
    assert best != 12
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(graddrop("GradDrop-Epoch"), tmp_path, [GradDropCallback()], **BEST)
    run.train()
    assert_is_best(run)


def test_best_model_of_a_model_in_full_is_loaded_at_the_end(tmp_path):
    run = trainer(other("full"), tmp_path, [GradDropCallback(GradDropConfig(**MASKED))], **BEST)
    run.train()
    assert_is_best(run)


def test_adapter_saved_by_the_trainer_gives_equal_logits_in_a_fresh_process(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    variants = ["GradDrop", "Layer-GradDrop", "GradDrop-Epoch-Toggle"]
    models = {variant: (graddrop(variant), [GradDropCallback()]) for variant in variants}
    models |= {name: (other(name), callbacks_for(name, GradDropConfig(**MASKED))) for name in OTHERS}
    for name, (model, callbacks) in models.items():
        run = trainer(model, tmp_path / "run", callbacks, num_train_epochs=2)
        run.train()
        run.save_model(str(tmp_path / name))
        torch.save(logits(model), tmp_path / name / "logits")
    done = run_program("-c", RELOAD, tmp_path, json.dumps(list(models)))
    assert done.returncode == 0, done.stderr[-3000:]


RELOAD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from peft import PeftModel
from tiny import logits
from transformers import AutoModelForCausalLM
import peft_sparsegrad

path = Path(sys.argv[1])
for name in json.loads(sys.argv[2]):
    base = AutoModelForCausalLM.from_pretrained(path / (name if name == "full" else "base"))
    model = base if name == "full" else PeftModel.from_pretrained(base, path / name)
    assert torch.equal(logits(model), torch.load(path / name / "logits")), name
"""
