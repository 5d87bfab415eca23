"""Loops that are not ours: only the gradients of steps that were taken count."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import adapted, batch, train_with_an_optimizer_each
from training_loop_tools import backward, sgd, supports, trained

from peft_sparsegrad.sparsegrad.layer import layer_adapters


def sums(model) -> list[torch.Tensor | None]:
    return [adapter.gradient_sum for adapter in layer_adapters(model, "default")]


def nothing(model, optimizer) -> None:
    pass


def batch_of_nan(model, optimizer) -> None:
    """A loop that skips a step whose gradient has NaN."""
    backward(model, 7, float("nan"))
    assert not torch.isfinite(torch.nn.utils.clip_grad_norm_(trained(model), 1.0))
    optimizer.zero_grad()


def batch_of_inf_set_to_zero(model, optimizer) -> None:
    """The same, with a gradient that is set to zero in place."""
    backward(model, 7, float("inf"))
    optimizer.zero_grad(set_to_none=False)


def discarded(model, optimizer) -> None:
    """A pass for the norm of its gradient."""
    backward(model, 7, 100.0)
    for parameter in trained(model):
        parameter.grad = None


def discarded_twice_in_place(model, optimizer) -> None:
    for _ in range(2):
        backward(model, 7, 100.0)
        optimizer.zero_grad(set_to_none=False)


def saliency(model, optimizer) -> None:
    """A gradient of the input alone."""
    embedded = model.get_input_embeddings()(batch(7)["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=batch(7)["labels"]).loss * 100
    assert torch.autograd.grad(loss, embedded)[0].any()


def failed(model, optimizer) -> None:
    """A backward pass that dies in its middle, and is discarded."""
    up = model.get_base_model().model.layers[0].mlp.up_proj
    handle = up.register_full_backward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        backward(model, 7, 100.0)
    handle.remove()
    optimizer.zero_grad()


INTERLUDES = [batch_of_nan, batch_of_inf_set_to_zero, discarded, discarded_twice_in_place, saliency, failed]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("interlude", INTERLUDES)
def test_pass_without_a_step_leaves_no_trace(interlude, micro_batches):
    models = []
    for between in (nothing, interlude):
        model = adapted(renewal_steps=4).train()
        optimizer = sgd(model)
        for number in range(4):
            between(model, optimizer)
            for micro in range(micro_batches):
                backward(model, number + micro)
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            if number == 2:
                models.append((model, copy.deepcopy(sums(model))))
    (plain, plain_sums), (model, model_sums) = models
    for ours, theirs in zip(model_sums, plain_sums, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.any()
    assert supports(model) == supports(plain) != supports(adapted())


def test_saliency_between_micro_batches_leaves_no_trace():
    found = []
    for between in (nothing, saliency):
        model = adapted(renewal_steps=4).train()
        optimizer = sgd(model)
        backward(model, 0)
        between(model, optimizer)
        backward(model, 1)
        optimizer.step()
        found.append(sums(model))
    assert all(map(torch.equal, *found))


def test_clipping_between_micro_batches_loses_none():
    """Something else has written to the gradient, and it was not set to zero."""
    model, expected = adapted(renewal_steps=4).train(), adapted(renewal_steps=4).train()
    for made, clips in ((model, True), (expected, False)):
        optimizer = sgd(made)
        backward(made, 0)
        if clips:
            torch.nn.utils.clip_grad_norm_(trained(made), 1e-3)
        backward(made, 1)
        optimizer.step()
    for ours, theirs in zip(sums(model), sums(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_several_steps_with_one_gradient_count_once():
    model = adapted(renewal_steps=9).train()
    optimizer = sgd(model)
    backward(model, 0)
    for _ in range(3):
        optimizer.step()
    assert {adapter.num_steps for adapter in layer_adapters(model, "default")} == {1}


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_optimizer_inside_the_backward_pass_is_the_one_after_it(checkpointing):
    losses, counted = [], []
    for inside in (False, True):
        model = adapted(renewal_steps=2).train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        losses.append(train_with_an_optimizer_each(model, 8, inside))
        counted.append({adapter.num_steps for adapter in layer_adapters(model, "default")})
    assert losses[0] == losses[1]
    assert counted == [{8}, {8}]
