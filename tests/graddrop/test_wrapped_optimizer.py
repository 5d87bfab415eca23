"""GradDropCallback with an optimizer that lets another one step, as a Lookahead does."""

import pytest
import torch
from peft import get_peft_model
from tiny import llama, rows
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import GradDropCallback, GradDropConfig


class Outer(torch.optim.Optimizer):
    """An optimizer whose step is that of another."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self._step_supports_amp_scaling = False
        super().__init__(optimizer.param_groups, optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)


@pytest.mark.parametrize("callbacks", [[GradDropCallback()], []], ids=["callback", "nothing called"])
def test_its_steps_are_those_of_the_run_that_the_masks_were_drawn_for(tmp_path, callbacks):
    model = get_peft_model(llama(), GradDropConfig(task_type="CAUSAL_LM", scale=False, p=0.5))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    settings = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_steps": 1}
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **settings)
    run = Trainer(model, arguments, train_dataset=rows(8), callbacks=callbacks, optimizers=(Outer(inner), None))
    run.train()
    now = dict(model.named_parameters())
    moved = torch.cat([(now[name] != before).flatten() for name, before in trained.items() if "norm" not in name])
    assert 0.4 < moved.float().mean() < 0.6
