"""The layers through PEFT's public API, held to a plain copy of the model with masked gradients."""

import pytest
import torch
from graddrop_layer_tools import LAYERS, One, made
from graddrop_tools import deltas, dropped, graddrop_layers, loss_of, masks_of, sgd, tower
from peft import get_peft_model
from tiny import bert, llama, logits
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig

SETTINGS = {
    "scaled": {"p": 0.5},
    "unscaled": {"p": 0.5, "scale": False},
    "plain": {"p": 0.0},
    "held": {"p": 0.5, "frozen": "hold"},
}


def twin_step(layer, model, x, lr: float = 0.0):
    """Set the twin's weights to W + delta, return output, the input's gradient and the masked gradients, and step."""
    (peft_layer,) = graddrop_layers(model).values()
    masks = masks_of(model)
    masks.progress.begin_pass()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    y.square().sum().backward()
    masked = {}
    for name, parameter in layer.named_parameters():
        mask = masks.mask(f"layer.{name}", peft_layer.graddrop_block)
        keep = mask.keep(parameter.shape, parameter.device)
        masked[f"layer.{name}"] = torch.where(keep, parameter.grad * mask.factor, torch.zeros(()).double())
        with torch.no_grad():
            parameter -= lr * masked[f"layer.{name}"]
        parameter.grad = None
    return y, x.grad, masked


def add_deltas(layer, model):
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter += deltas(model)[f"layer.{name}"]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_output_and_gradients_are_those_of_a_plain_layer_with_masked_gradients(kind, settings):
    layer, model, x = made(kind, **SETTINGS[settings])
    add_deltas(layer, model)
    own = x.clone().requires_grad_(x.is_floating_point())
    y = model(own)
    y.square().sum().backward()
    expected_y, expected_dx, masked = twin_step(layer, model, x)
    assert torch.allclose(y, expected_y)
    assert own.grad is None if expected_dx is None else torch.allclose(own.grad, expected_dx)
    assert deltas(model).keys() == masked.keys()
    for name, delta in deltas(model).items():
        assert torch.allclose(delta.grad, masked[name])
        assert torch.equal(delta.grad == 0, masked[name] == 0)


@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_merged_weights_after_training_are_the_plain_layers(kind):
    layer, model, x = made(kind, p=0.5)
    add_deltas(layer, model)
    optimizer = sgd(model, lr=1e-3)
    for _ in range(4):
        model(x).square().sum().backward()
        twin_step(layer, model, x, lr=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    merged = model.merge_and_unload().layer
    assert type(merged) is type(layer)
    for name, parameter in layer.named_parameters():
        assert torch.allclose(merged.get_parameter(name), parameter, atol=1e-12)


@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_base_weight_gets_no_gradient_and_stays(kind):
    layer, model, x = made(kind)
    optimizer = sgd(model)
    model(x).square().sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        own = model.base_model.model.layer.base_layer.get_parameter(name)
        assert own.grad is None
        assert not own.requires_grad
        assert torch.equal(own, parameter)


@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_zero_delta_changes_nothing(kind):
    layer, model, x = made(kind)
    for delta in deltas(model).values():
        delta.data.zero_()
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("make", [llama, bert])
def test_fresh_adapter_changes_nothing(make):
    expected = logits(make())
    assert torch.equal(logits(dropped(make())), expected)


@pytest.mark.parametrize("frozen", ["hold", "gradient"])
def test_gradient_of_a_masked_layer_is_none_or_zero_as_frozen_says(frozen):
    model = dropped(tower(), "GradFreeze-TopDown", num_epochs=3, frozen=frozen)
    GradDrop(model).set_epoch(0)
    loss_of(model).backward()
    for name, delta in deltas(model).items():
        if name.startswith("layers.2."):
            assert delta.grad.any()
        else:
            assert delta.grad is None if frozen == "hold" else not delta.grad.any()


def test_no_gradient_mode_leaves_masks_alone():
    model = dropped(tower(), "GradDrop-Epoch", num_epochs=3)
    with torch.no_grad():
        assert loss_of(model).isfinite()


def test_layer_that_returns_a_view_can_be_changed_in_place():
    class InPlace(One):
        def forward(self, x):
            return self.layer(x).mul_(2.0)

    model = get_peft_model(InPlace(nn.Linear(6, 5)), GradDropConfig(target_modules=["layer"], p=0.0))
    model(torch.randn(2, 3, 6)).sum().backward()
    assert deltas(model)["layer.weight"].grad.any()


def test_normalisation_with_running_statistics_is_refused():
    with pytest.raises(TypeError, match="'1' is a BatchNorm2d"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), GradDropConfig(target_modules=["0", "1"]))


def test_representation_says_graddrop():
    model = dropped(tower())
    assert "graddrop.GradDropLinear(" in repr(model)


def test_conversion_to_lora_is_declined():
    assert not next(iter(graddrop_layers(dropped()).values())).supports_lora_conversion()
