"""The warm-up in loops that do not call it: which passes count, and when it ends."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import adapted, batch
from training_loop_tools import backward, sgd, supports
from transformers import AlbertConfig, AlbertForSequenceClassification

from peft_sparsegrad import SparseGradConfig, warmup
from peft_sparsegrad.sparsegrad.layer import layer_adapters


def three_passes(model, number: int) -> torch.Tensor:
    """A triplet loss: three forward passes and one backward pass."""
    return sum(model(**batch(3 * number + each)).loss for each in range(3))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_several_forward_passes_with_checkpointing_are_one_pass(use_reentrant):
    models = [adapted(warmup_steps=4).train() for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in models:
        optimizer = sgd(model)
        settled = []
        for number in range(6):
            three_passes(model, number).backward()
            settled.append(all(adapter.is_settled for adapter in layer_adapters(model, "default")))
            optimizer.step()
            optimizer.zero_grad()
        assert settled == [False] * 4 + [True] * 2, "in the step after the fourth pass"
    assert supports(models[0]) == supports(models[1])


def test_layer_that_is_used_by_every_block_counts_once_a_pass():
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=2, num_labels=2,
    )  # fmt: skip
    settings = {"target_modules": ["ffn", "ffn_output"], "density": 0.05, "warmup_steps": 4, "task_type": "SEQ_CLS"}
    model = get_peft_model(AlbertForSequenceClassification(config), SparseGradConfig(**settings)).train()
    optimizer, settled = sgd(model), []
    for number in range(5):
        ids = batch(number)["input_ids"]
        model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        settled.append(all(adapter.is_settled for adapter in layer_adapters(model, "default")))
    assert settled == [False] * 3 + [True] * 2


def test_warm_up_ends_before_the_next_pass_where_no_step_is_seen():
    """Gradients that are looked at, and never stepped with."""
    model = adapted(warmup_steps=4).train()
    for number in range(4):
        backward(model, number)
    assert not any(adapter.is_settled for adapter in layer_adapters(model, "default"))
    backward(model, 4)
    assert all(adapter.is_settled for adapter in layer_adapters(model, "default"))


def test_passes_with_a_gradient_of_zero_do_not_count(caplog):
    """As in GRPO, while all answers have the same reward."""
    model, expected = adapted(warmup_steps=4).train(), adapted(warmup_steps=4).train()
    optimizer = sgd(model)
    for number in range(7):
        backward(model, number, factor=float(number >= 3))
        optimizer.step()
        optimizer.zero_grad()
        assert all(each.is_settled for each in layer_adapters(model, "default")) == (number == 6)
    assert "3 without a gradient passed over" in caplog.text
    for number in range(3, 7):
        backward(expected, number)
        sgd(expected).step()
    assert supports(model) == supports(expected)


def test_passes_with_nan_are_left_out_as_the_loop_leaves_them(caplog):
    model = adapted(warmup_steps=4).train()
    optimizer = sgd(model)
    for number in range(6):
        backward(model, number, factor=float("nan") if number in (1, 3) else 1.0)
        if number not in (1, 3):
            optimizer.step()
        optimizer.zero_grad()
    assert all(adapter.is_settled for adapter in layer_adapters(model, "default"))
    assert "leaves out a gradient of" in caplog.text
    assert all(torch.isfinite(adapter.basis.U if adapter.basis.V is None else adapter.basis.V).all()
               for adapter in layer_adapters(model, "default"))  # fmt: skip


def test_explicit_warm_up_on_zeros_is_refused_and_changes_nothing():
    model = adapted(warmup_steps=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the gradient of 4 batches was zero"):
        warmup(model, lambda: backward(model, 0, 0.0), steps=4, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_explicit_warm_up_passes_over_batches_without_labels():
    batches = [batch(number) for number in range(4)]
    unlabelled = {**batch(9), "labels": torch.full_like(batch(9)["labels"], -100)}
    model, expected = adapted(warmup_steps=4), adapted(warmup_steps=4)
    report = warmup(model, [batches[0], unlabelled, *batches[1:]], steps=4, progress=False)
    warmup(expected, batches, steps=4, progress=False)
    assert report.passed_over == 1
    assert supports(model) == supports(expected)
    with pytest.raises(ValueError, match="ran dry after 0 of 2, and 3 more have no label"):
        warmup(adapted(warmup_steps=4), [unlabelled] * 3, steps=2, progress=False)
