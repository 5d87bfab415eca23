"""The three ways of running the warm-up: with batches, with a callable, and by training alone."""

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import adapted, batch, llama, logits, train
from torch import nn
from warmup_tools import BATCHES, layers, same, state

from peft_sparsegrad import SparseGradConfig, warmup, warmup_report


@pytest.mark.parametrize("settings", [{}, {"rank": 16}, {"basis": "svd"}, {"support": "dynamic"}], ids=str)
@pytest.mark.parametrize("passes", [2, 3, 4])
def test_every_way_of_warming_up_gives_the_same(settings, passes):
    """Batches, a callable, and the first passes of a training whose rate is 0."""
    first, second, third = (adapted(warmup_steps=passes, **settings) for _ in range(3))
    report = warmup(first, BATCHES, progress=False)
    assert report.passes == passes
    position = iter(BATCHES[:passes])
    warmup(second, lambda: second(**next(position)).loss.backward(), progress=False)
    for data in BATCHES[:passes]:
        third(**data).loss.backward()
        third.zero_grad()
    third.eval()(**BATCHES[0])  # the next forward pass ends the last pass
    assert same(state(first), state(second))
    assert same(state(first), state(third))
    assert all(layer.adapter("default").is_settled for layer in layers(third))


def test_a_pass_without_a_gradient_is_run_again():
    """Two batches of zero gradients among four: the other two are used for bases and supports."""
    model, expected, silent = adapted(warmup_steps=4), adapted(warmup_steps=4), iter([True, False, True, False] * 2)
    position = iter([None, BATCHES[0], None, BATCHES[1]] * 2)

    def run_pass():
        data = next(position)
        (model(**(data or BATCHES[0])).loss * (0.0 if next(silent) else 1.0)).backward()

    report = warmup(model, run_pass, steps=4, progress=False)
    assert (report.passes, report.passed_over) == (4, 4)
    warmup(expected, BATCHES[:2] * 2, progress=False)
    assert same(state(model), state(expected))


def test_warm_up_leaves_model_and_gradients_alone():
    model = adapted(warmup_steps=4, modules_to_save=["lm_head"]).eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if "sparsegrad_" not in key}
    expected = logits(model)
    model(**batch()).loss.backward()
    head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n)
    kept = head.grad.clone()
    warmup(model, BATCHES, progress=False)
    assert torch.equal(head.grad, kept)
    assert not model.training
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_nothing_called_watches_then_trains(caplog):
    model = adapted(warmup_steps=4)
    losses = train(model, steps=4)
    assert all(layer.adapter("default").is_settled for layer in layers(model))
    assert not any(layer.adapter("default").values.any() for layer in layers(model))
    done = [record.getMessage() for record in caplog.records if "warm-up is done" in record.getMessage()]
    assert len(done) == 1
    assert re.search(r"4 backward passes in \d.* s, worth about \d+ training steps of one pass, 6 layers", done[0])
    assert "\n" not in done[0]
    assert warmup_report(model).passes == 4
    assert train(model, steps=9)[-1] < losses[0]


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_nothing_called_takes_exactly_the_steps_asked_for(steps):
    model = adapted(warmup_steps=steps)
    train(model, steps=steps - 1)
    assert not layers(model)[0].adapter("default").is_settled
    train(model, steps=1)
    assert all(layer.adapter("default").is_settled for layer in layers(model))


def test_evaluation_during_the_warm_up_is_not_watched():
    model = adapted(warmup_steps=3)
    train(model, steps=1)
    logits(model)
    with torch.no_grad():
        model(**batch())
    assert layers(model)[0].adapter("default").warmup.passes_watched == 1


def test_a_layer_that_is_not_used_in_every_pass_does_not_hold_up_the_others():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.sometimes = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, both):
            return self.sometimes(self.always(x)) if both else self.always(x)

    config = SparseGradConfig(target_modules=["always", "sometimes"], density=0.2, warmup_steps=4)
    model = get_peft_model(Branches(), config)
    for step in range(8):
        model(torch.randn(4, 16), both=step % 2 == 0).square().sum().backward()
    assert all(layer.adapter("default").is_settled for layer in layers(model))


def test_dynamic_support_needs_only_the_basis():
    model = adapted(warmup_steps=4, support="dynamic")
    report = warmup(model, BATCHES, progress=False)
    assert report.passes == 4
    assert layers(model)[0].adapter("default").indices is None
    train(model, steps=1)
    for layer in layers(model):
        adapter = layer.adapter("default")
        plan, values = adapter.plan, adapter.values
        assert values.numel() == plan.num_entries
        assert int((values != 0).sum()) == plan.k


@pytest.mark.parametrize("steps", [0, 3])
def test_saving_before_the_end_of_a_warm_up_says_that_it_begins_again(tmp_path, steps):
    model = adapted(warmup_steps=4)
    train(model, steps=steps)
    with pytest.warns(
        UserWarning, match=f"saved after {steps} of the 4 passes.*begins the warm-up again.*set `warmup_steps=2`, or"
    ):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert train(loaded, steps=6) == train(adapted(warmup_steps=4), steps=6)
