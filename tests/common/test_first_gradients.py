"""Adapted layers to which no gradient comes: named once, after the first backward pass, and training goes on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import batch, llama, train
from torch import nn
from torch.optim import SGD

from peft_sparsegrad import GradDropConfig, SparseGradConfig

CONFIGS = [SparseGradConfig, GradDropConfig]
LOST = "received no gradient in the first backward pass"


class Sidelined(nn.Module):
    """A layer that the loss depends on, one whose output is thrown away, and one that is not run."""

    def __init__(self):
        super().__init__()
        self.used, self.thrown_away, self.never_run = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        self.thrown_away(x)
        return self.used(x)


def sidelined(config, **settings):
    return get_peft_model(Sidelined(), config(target_modules=["used", "thrown_away", "never_run"], **settings))


def steps(model, number: int, optimizer=None) -> list[str]:
    """Take steps, and return the warnings that name layers without gradient."""
    optimizer = optimizer or SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(number):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(each.message) for each in said if LOST in str(each.message)]


@pytest.mark.parametrize("config", CONFIGS)
def test_layers_without_gradient_are_named_once(config):
    model = sidelined(config)
    (said,) = steps(model, 4)
    assert "2 of 3 adapted layers" in said
    assert "'thrown_away', 'never_run'" in said
    assert "'used'" not in said


@pytest.mark.parametrize("config", CONFIGS)
def test_a_copy_and_an_adapter_without_peft_model_are_watched_too(config):
    assert len(steps(copy.deepcopy(sidelined(config)), 2)) == 1
    targets = ["used", "never_run"]
    model = inject_adapter_in_model(config(target_modules=targets), Sidelined())
    assert len(steps(model, 2)) == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_steps_before_any_backward_pass_say_nothing(config):
    model = sidelined(config)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert len(steps(model, 1, optimizer)) == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_is_said_where_all_layers_train(config):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{LOST}")
        train(get_peft_model(llama(), config()), steps=2)


def test_blocks_that_graddrop_freezes_are_not_named():
    config = GradDropConfig.from_variant("Layer-GradDrop", p=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{LOST}")
        train(get_peft_model(llama(), config), steps=6)


def test_a_layer_that_a_backward_pass_updates_at_once_is_not_named():
    model = get_peft_model(llama(), SparseGradConfig())
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters() if p.requires_grad}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{LOST}")
        model(**batch()).loss.backward()


def test_a_warm_up_goes_on_without_layers_that_are_no_part_of_the_loss():
    """The head of SigLIP's vision tower is not: LoRA trains the other layers, and so does SparseGrad."""
    targets = ["mlp.fc1", "mlp.fc2"]
    for config in (LoraConfig(target_modules=targets), SparseGradConfig(target_modules=targets, warmup_steps=4)):
        model = get_peft_model(tiny_model("siglip"), config)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.Adam(trained.values(), lr=0.01)
        for _ in range(7):
            model(**tiny_inputs(model.get_base_model())).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = {name for name, p in trained.items() if not torch.equal(p, before[name])}
        assert moved == {name for name in trained if ".head.mlp." not in name}


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_of_a_deleted_adapter_stays_on_the_layers(config):
    model = get_peft_model(llama(), config(), adapter_name="kept")
    model.add_adapter("gone", config())
    model.delete_adapter("gone")
    for layer in (module for module in model.modules() if hasattr(module, "first_gradients")):
        assert "kept" in layer._all_available_adapter_names()
        for name in (each for each in dir(layer) if not each.startswith("_")):
            held = getattr(layer, name, None)
            assert not (isinstance(held, (dict, torch.nn.ModuleDict)) and "gone" in held), name
