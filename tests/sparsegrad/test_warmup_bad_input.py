"""Warm-ups without data, loss or gradient are refused or named, and can be run again."""

import pytest
import torch
from peft import get_peft_model
from tiny import adapted, llama, train
from torch import nn
from warmup_tools import BATCHES, same, state

from peft_sparsegrad import SparseGradConfig, warmup
from peft_sparsegrad.sparsegrad.layer import layer_adapters


def refuses(model, batches, message, **settings):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        warmup(model, batches, progress=False, **settings)
    assert same(state(model), before)
    return model


def test_batches_without_a_loss():
    unlabelled = [{key: value for key, value in data.items() if key != "labels"} for data in BATCHES]
    refuses(adapted(warmup_steps=4), unlabelled, "batch 0 gave no loss: put `labels` into the batch")


def test_batches_that_run_dry():
    refuses(adapted(warmup_steps=4), iter(BATCHES), "ran dry after 4 of 5", steps=5)
    refuses(adapted(warmup_steps=4), [], "ran dry after 0 of 4")
    refuses(adapted(warmup_steps=4), BATCHES[:1], "ran dry after 1 of 4.*of which the warm-up needs 2")
    refuses(adapted(warmup_steps=4), BATCHES, "`steps` must be at least 2 .*, not 1", steps=1)


def test_fewer_batches_than_the_configuration_asks_for_are_used_once_each():
    model, expected = adapted(warmup_steps=8), adapted(warmup_steps=3)
    assert warmup(model, iter(BATCHES[:3]), progress=False).passes == 3
    warmup(expected, BATCHES, progress=False)
    assert same(state(model), state(expected))


def test_callable_that_runs_dry():
    model, position = adapted(warmup_steps=4), iter(BATCHES)
    refuses(model, lambda: model(**next(position)).loss.backward(), "ran dry", steps=5)


def test_callable_without_a_backward_pass():
    model = adapted(warmup_steps=4)
    refuses(model, lambda: model(**BATCHES[0]), "saw no gradient", steps=2)


def test_loss_that_is_not_finite():
    model = adapted(warmup_steps=4)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[3, 0] = float("inf")
    refuses(model, BATCHES, "batch 0 gave a loss of")


def test_gradient_that_is_not_finite_names_the_module():
    model = adapted(warmup_steps=4)

    def backward():
        loss = model(**BATCHES[0]).loss
        (loss * float("inf")).backward()

    refuses(model, backward, "NaN or Inf in the gradient of module 'model.layers.2.mlp.down_proj'", steps=2)


def test_after_a_failure_the_warm_up_can_be_run_again():
    model = refuses(adapted(warmup_steps=4), iter(BATCHES), "ran dry", steps=5)
    expected = adapted(warmup_steps=4)
    warmup(expected, BATCHES, progress=False)
    warmup(model, BATCHES, progress=False)
    assert same(state(model), state(expected))


def test_trained_adapter_is_not_warmed_up_again():
    model = adapted()
    train(model, steps=1)
    refuses(model, BATCHES, "has been trained: another basis or support")


def test_nothing_to_warm_up():
    with pytest.raises(ValueError, match="no SparseGrad adapter"):
        warmup(llama(), BATCHES)
    with pytest.raises(ValueError, match="needs no data"):
        warmup(adapted(basis="svd", support="dynamic"), BATCHES)
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        warmup(model, BATCHES)


def test_modules_outside_the_loss_are_named(caplog):
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.heard, self.unheard = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return {"loss": self.heard(x).square().sum()}

    model = get_peft_model(Deaf(), SparseGradConfig(target_modules=["heard", "unheard"], density=0.2))
    warmup(model, [{"x": torch.randn(4, 16)}] * 2, progress=False)
    assert "saw no gradient of ['unheard'] in its passes for the bases" in caplog.text
    assert "saw no gradient of ['unheard'], so their supports are data-free" in caplog.text
    heard, unheard = layer_adapters(model, "default")
    assert heard.is_settled
    assert unheard.is_settled
    assert unheard.basis.U is None or torch.equal(unheard.basis.U, torch.eye(*unheard.basis.U.shape))
