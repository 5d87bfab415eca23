"""An adapter that was loaded for inference and made trainable afterwards warms up and renews like any other."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tiny import adapted, llama, logits, train

from peft_sparsegrad.sparsegrad.layer import layer_adapters


def with_set_adapter(model):
    model.set_adapter("default")


def by_name(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("sparsegrad_adapter" in name)


HOW = pytest.mark.parametrize("make_trainable", [with_set_adapter, by_name])


def loaded(path, make_trainable):
    model = PeftModel.from_pretrained(llama(), path)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    make_trainable(model)
    return model


@HOW
def test_support_is_renewed(tmp_path, make_trainable):
    model = adapted(renewal_steps=5)
    train(model, steps=7)
    model.save_pretrained(tmp_path)
    other, trainable = (
        loaded(tmp_path, make_trainable),
        PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True),
    )
    assert train(other, steps=10) == train(trainable, steps=10)
    for one, two, start in zip(*(layer_adapters(m, "default") for m in (other, trainable, model)), strict=True):
        assert one.num_steps == two.num_steps == 17
        assert torch.equal(one.indices, two.indices)
        assert not torch.equal(one.indices, start.indices)


@HOW
@pytest.mark.filterwarnings("ignore:The adapter 'default' is saved after 0 of the 4 passes")
def test_warm_up_comes_first_and_nothing_is_lost(tmp_path, make_trainable):
    adapted(warmup_steps=4).save_pretrained(tmp_path / "new")
    model = loaded(tmp_path / "new", make_trainable)
    assert not any(each.is_settled for each in layer_adapters(model, "default"))
    losses = train(model, steps=12)
    assert losses[-1] < losses[0]
    assert all(each.is_settled and each.values.any() for each in layer_adapters(model, "default"))
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(llama(), tmp_path / "trained", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert all(each.num_steps == 8 for each in layer_adapters(again, "default")), "no second warm-up"
