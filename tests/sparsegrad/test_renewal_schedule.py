"""When supports are renewed: at the first number of steps and each time it has doubled."""

import pytest
import torch
from renewal_tools import adamw, counted, layers, run_of, step, supports, trained_parameters
from tiny import adapted, batch, train

from peft_sparsegrad import create_sparsegrad_optimizer, warmup
from peft_sparsegrad.sparsegrad.renewal import next_renewal


@pytest.mark.parametrize("first", [1, 2, 3, 25])
def test_renewals_come_when_the_number_of_steps_has_doubled(first):
    due = [steps for steps in range(1, 500) if next_renewal(steps - 1, first) == steps]
    assert due == [first * 2**i for i in range(12) if first * 2**i < 500]


def test_no_renewal_where_none_was_asked_for():
    model = adapted(renewal_steps=0)
    before = supports(model)
    train(model, steps=30)
    assert supports(model) == before
    assert all(layer.adapter("default").gradient_sum is None for layer in layers(model))


def test_default_renews_at_the_25th_step():
    model = adapted()
    before, optimizer = supports(model), adamw(model)
    for number in range(24):
        step(model, optimizer, number)
    assert supports(model) == before
    step(model, optimizer)
    assert supports(model) != before


def test_dynamic_supports_have_no_sum():
    model = adapted(support="dynamic")
    step(model, create_sparsegrad_optimizer(model, lr=1e-3))
    assert {layer.adapter("default").gradient_sum for layer in layers(model)} == {None}


def test_steps_are_counted_from_the_end_of_the_warm_up():
    """The step that ends the warm-up has moved nothing, and is not one of them."""
    model = adapted(warmup_steps=4, renewal_steps=3)
    optimizer = adamw(model)
    for number in range(3):
        step(model, optimizer, number)
    assert counted(model) == {-1}
    step(model, optimizer)
    assert counted(model) == {0}
    assert {layer.adapter("default").gradient_sum for layer in layers(model)} == {None}
    chosen = supports(model)
    step(model, optimizer)
    step(model, optimizer)
    assert supports(model) == chosen
    step(model, optimizer)
    assert supports(model) != chosen


def test_accumulation_counts_steps_and_sums_passes():
    model, single = adapted(renewal_steps=3), adapted(renewal_steps=3)
    optimizers = [torch.optim.SGD(trained_parameters(m), lr=0.5) for m in (model, single)]
    for number in range(4):
        for half in (slice(0, 4), slice(4, 8)):
            part = {"input_ids": batch(number)["input_ids"][half]}
            (model(**part, labels=part["input_ids"]).loss / 2).backward()
        ids = batch(number)["input_ids"]
        single(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if number == 1:
            sums = [[layer.adapter("default").gradient_sum for layer in layers(m)] for m in (model, single)]
            for ours, whole in zip(*sums, strict=True):
                torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-3)
                assert ours.any()
    assert counted(model) == counted(single) == {4}
    assert supports(model) == supports(single)


def test_explicit_warm_up_begins_the_sum_after_it():
    model = adapted(warmup_steps=4, renewal_steps=2)
    warmup(model, [batch(number) for number in range(4)], progress=False)
    assert {layer.adapter("default").gradient_sum for layer in layers(model)} == {None}
    before = supports(model)
    run_of(model, steps=1)
    assert supports(model) == before
    run_of(model, steps=1)
    assert supports(model) != before
