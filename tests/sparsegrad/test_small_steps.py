"""The warning that the learning rate is one of full fine-tuning: when it comes, and when it must not."""

import copy
import warnings

import pytest
import torch
from tiny import adapted, batch, llama

from peft_sparsegrad import create_sparsegrad_optimizer

MESSAGE = "the values of the adapter 'default' hardly move"


def train(model, lr, schedule=lambda step: 1.0, steps=33, optimizer=None):
    """The warnings of so many steps with AdamW, whose learning rate is `lr` times what the schedule says."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            model(**batch(step % 4, size=2)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return [str(warning.message) for warning in said if MESSAGE in str(warning.message)]


def model(**settings):
    return adapted(llama(num_hidden_layers=1), **{"density": 0.01, **settings})


@pytest.mark.parametrize("support", ["static", "dynamic"])
@pytest.mark.parametrize(("lr", "count"), [(5e-5, 1), (1e-3, 0)])
def test_it_is_said_once_at_a_learning_rate_of_full_fine_tuning(lr, count, support):
    sparse = model(support=support)
    said = train(sparse, lr, steps=70, optimizer=create_sparsegrad_optimizer(sparse, lr))
    assert len(said) == count
    assert all("after 32 optimizer steps" in message and "lr=1e-3" in message for message in said)


def test_steps_of_the_warm_up_do_not_count():
    said = train(model(warmup_steps=4), 5e-5, steps=37)
    assert len(said) == 1
    assert "after 32 optimizer steps" in said[0]


@pytest.mark.parametrize("warmup_of_the_rate", [50, 1000])
def test_a_warm_up_of_the_learning_rate_is_no_reason(warmup_of_the_rate):
    assert not train(model(), 1e-3, lambda step: min(1.0, step / warmup_of_the_rate), steps=66)


@pytest.mark.parametrize("steps", [34, 48, 100])
def test_a_fall_of_the_learning_rate_is_no_reason(steps):
    assert not train(model(), 1e-3, lambda step: 1 - step / steps, steps=steps)


def test_rounds_that_end_with_a_small_learning_rate_are_no_reason():
    assert not train(model(), 1e-3, lambda step: 1 - step % 16 / 16, steps=70)


def test_after_a_warm_up_of_a_small_learning_rate_it_is_said():
    assert len(train(model(), 5e-5, lambda step: min(1.0, step / 16), steps=66)) == 1


def test_a_run_that_goes_on_may_have_a_small_learning_rate():
    trained = model()
    assert not train(trained, 1e-3, steps=3)
    again = model()
    again.load_state_dict(trained.state_dict())
    assert not train(again, 1e-6)


def test_a_full_density_is_full_fine_tuning_and_its_learning_rate_is_right():
    assert not train(model(density=1.0), 5e-5)


def test_a_copy_says_it_by_itself():
    first = model()
    second = copy.deepcopy(first)
    assert len(train(second, 5e-5)) == len(train(first, 5e-5)) == 1
