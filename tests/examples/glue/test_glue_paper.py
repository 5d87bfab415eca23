"""The published method as the program trains it: 50 steps in float64 beside the paper's layer and masked Adam."""

from __future__ import annotations

import pytest
import torch
from glue_tools import make_run, save_model, write_data
from paper_layer import PaperAdam, PaperLinear
from tiny import tokenizer
from transformers import TrainerCallback

from examples.glue.dataset import Splits, load_task, tokenize
from examples.glue.finetune import Costs, Finetuner
from examples.glue.model import build_model, target_layers
from examples.glue.tasks import TASKS

STEPS, CLIP = 50, 1.0


class Twin(TrainerCallback):
    """The same model with `PaperLinear` in its MLP, which takes every step on the same batch as the Trainer's.

    The bases are those of the Trainer's warm-up; all else is its own.
    """

    def __init__(self, run, model):
        self.model, self.steps = model, 0
        self.twin = build_model(make_run(**{**vars(run), "method": "full"}), TASKS[run.task]).model.double()
        self.batch, self.lr = {}, 0.0

    def on_train_begin(self, *args, **kwargs):  # after the warm-up
        self.paper = {}
        for name, linear in target_layers(self.twin, None).items():
            adapter = self.model.get_submodule(f"base_model.model.{name}").adapter("default")
            layer = PaperLinear(linear, adapter.basis.U.clone(), adapter.basis.V.clone(), k=adapter.plan.k)
            parent, _, child = name.rpartition(".")
            setattr(self.twin.get_submodule(parent), child, layer)
            self.paper[name] = layer
        cores = [layer.weight for layer in self.paper.values()]
        self.rest = [p for p in self.twin.parameters() if all(p is not core for core in cores)]
        self.masked_adam = PaperAdam(cores, lr=0.0)
        self.adamw = torch.optim.AdamW(self.rest, lr=0.0, weight_decay=0.0)
        self.model.register_forward_pre_hook(self.keep_batch, with_kwargs=True)
        self.twin.train()

    def keep_batch(self, module, args, kwargs):
        if module.training:
            self.batch = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}

    def on_pre_optimizer_step(self, *args, optimizer, **kwargs):
        (self.lr,) = {group["lr"] for group in optimizer.param_groups}

    def on_step_end(self, args, state, control, **kwargs):
        self.twin.zero_grad()
        self.twin(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.twin.parameters(), CLIP)
        for layer in self.paper.values():
            layer.mask_gradient()
        self.masked_adam.lr = self.adamw.param_groups[0]["lr"] = self.lr
        self.masked_adam.step()
        self.adamw.step()
        self.steps += 1
        control.should_training_stop = self.steps == STEPS


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Twin:
    folder = tmp_path_factory.mktemp("paper")
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, data = save_model(folder / "model", **quiet), write_data(folder / "data")
    settings = {"rest": "trained", "lr": 1e-3, "epochs": 100, "patience": 100, "head_steps": 0}
    run = make_run(model=str(model), method="paper", **settings)
    ours, task = build_model(run, TASKS[run.task]), TASKS[run.task]
    ours.model.double()
    splits = Splits(*(tokenize(rows, task, tokenizer(), 32) for rows in load_task(task, data)))
    finetuner = Finetuner(tokenizer(), {run.task: splits}, folder, [])
    trainer = finetuner._trainer(run, task, ours, folder / "run", Costs())
    assert trainer.args.max_grad_norm == CLIP
    twin = Twin(run, ours.model)
    trainer.args.load_best_model_at_end = False
    trainer.add_callback(twin)
    trainer.train()
    return twin


def test_fifty_steps_of_the_program_are_the_papers(trained):
    assert trained.steps == STEPS
    for name, layer in trained.paper.items():
        ours = trained.model.get_submodule(f"base_model.model.{name}")
        weight = ours.base_layer.weight + ours.get_delta_weight("default")
        torch.testing.assert_close(weight, layer.original_weight(), rtol=1e-8, atol=1e-8)
        adapter = ours.adapter("default")
        assert torch.count_nonzero(adapter.values) > adapter.plan.k  # other steps have other largest gradients


def test_the_rest_of_the_model_is_trained_by_adamw(trained):
    ours = {name.replace("modules_to_save.default.", ""): p for name, p in trained.model.named_parameters()}
    rest = [name for name, p in trained.twin.named_parameters() if any(p is each for each in trained.rest)]
    assert len(rest) > 20
    for name in rest:
        theirs = trained.twin.get_parameter(name)
        torch.testing.assert_close(ours[f"base_model.model.{name}"], theirs, rtol=1e-8, atol=1e-8)
