"""Optimizers that hold copies or other gradients: refused where their steps cannot be seen."""

from __future__ import annotations

import pytest
import torch
from tiny import adapted, batch, logits
from training_loop_tools import backward, sgd, trained

from peft_sparsegrad.sparsegrad.layer import layer_adapters


def step_on_copies(model, copies, optimizer) -> None:
    for parameter, own in zip(trained(model), copies, strict=True):
        own.grad = parameter.grad.clone()
    optimizer.step()
    with torch.no_grad():
        for parameter, own in zip(trained(model), copies, strict=True):
            parameter.data.copy_(own)  # as DeepSpeed does, without a trace in the parameter's version
            parameter.grad = None


@pytest.mark.parametrize("settings", [{"renewal_steps": 25}, {"support": "dynamic"}])
def test_optimizer_on_copies_is_refused_in_its_second_pass(settings):
    model = adapted(**settings).train()
    copies = [parameter.detach().clone() for parameter in trained(model)]
    optimizer = torch.optim.AdamW(copies, lr=0.01)
    backward(model, 0)
    step_on_copies(model, copies, optimizer)
    with pytest.raises(RuntimeError, match="changed without a step of an optimizer that holds them"):
        backward(model, 1)


def test_optimizer_on_copies_trains_a_support_that_stays():
    model, plain = adapted(renewal_steps=0).train(), adapted(renewal_steps=0).train()
    copies = [parameter.detach().clone() for parameter in trained(model)]
    on_copies, own = torch.optim.AdamW(copies, lr=0.01), torch.optim.AdamW(trained(plain), lr=0.01)
    for number in range(5):
        backward(model, number)
        step_on_copies(model, copies, on_copies)
        backward(plain, number)
        own.step()
        own.zero_grad()
    assert torch.equal(logits(model), logits(plain))


def test_gradient_that_no_backward_pass_has_made_is_refused():
    model = adapted(renewal_steps=5).train()
    optimizer = sgd(model)
    gradients = torch.autograd.grad(model(**batch(0)).loss, trained(model))
    for parameter, gradient in zip(trained(model), gradients, strict=True):
        parameter.grad = gradient
    with pytest.raises(RuntimeError, match=r"not made by `backward\(\)`.*`renewal_steps=0`"):
        optimizer.step()


def test_adapter_loaded_between_two_passes_is_no_step_on_a_copy(tmp_path):
    other = adapted(init_weights=False)
    other.save_pretrained(tmp_path)
    model = adapted(renewal_steps=5).train()
    backward(model, 0)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    model.train()
    backward(model, 1)
    sgd(model).step()
    assert {adapter.num_steps for adapter in layer_adapters(model, "default")} == {1}


def test_adam_is_refused_for_a_dynamic_support():
    model = adapted(support="dynamic").train()
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    backward(model, 0)
    optimizer.step()  # no entry has a momentum yet
    optimizer.zero_grad()
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"moved values of .* whose gradient is zero.*create_sparsegrad_optimizer"):
        optimizer.step()


def test_sgd_is_as_good_as_masked_for_a_dynamic_support():
    model = adapted(support="dynamic").train()
    optimizer = sgd(model)
    for number in range(5):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    assert all(adapter.values.any() for adapter in layer_adapters(model, "default"))
