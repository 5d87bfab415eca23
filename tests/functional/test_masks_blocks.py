"""Masks that keep or drop a layer as a whole, or multiply all of it by one noisy number."""

import math

import pytest
import torch
from mask_tools import CPU, normal, within_binomial_bounds

from peft_sparsegrad.functional import bernoulli_block_mask, gaussian_block_mask, stream_key
from peft_sparsegrad.functional.masks import normal_table
from peft_sparsegrad.functional.streams import DRAWS, Key, single_draw


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [True, False])
def test_bernoulli_block_mask_is_the_literal_one(rate, scale):
    dropped = round(rate * DRAWS)
    for step in range(300):
        key = stream_key(0, "layer.0", step)
        kept_factor = DRAWS / (DRAWS - dropped) if scale else 1
        assert bernoulli_block_mask(key, rate, scale).factor == (kept_factor if single_draw(key) >= dropped else 0)


def test_bernoulli_block_mask_at_the_limit():
    key = Key(600, 0)
    assert not bernoulli_block_mask(key, 600 / DRAWS, False).keeps_nothing
    assert bernoulli_block_mask(key, 601 / DRAWS, False).keeps_nothing


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_bernoulli_layer_rate_and_mean_over_many_steps(rate):
    steps = 5000
    drawn = [bernoulli_block_mask(stream_key(0, "layer.0", step), rate, True) for step in range(steps)]
    assert within_binomial_bounds(sum(mask.keeps_nothing for mask in drawn), steps, rate)
    mean = sum(mask.factor for mask in drawn) / steps
    assert abs(mean - 1) <= 5 * math.sqrt(rate / (1 - rate) / steps) + 1e-12


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_gaussian_block_mask_is_the_literal_one(rate):
    for step in range(100):
        key = stream_key(0, "layer.0", step)
        expected = 1 + math.sqrt(rate / (1 - rate)) * normal_table(CPU)[single_draw(key)].item()
        assert gaussian_block_mask(key, rate).factor == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_negative_factor_keeps_everything():
    """Gaussian noise of a layer can turn its gradient around."""
    mask = gaussian_block_mask(Key(5, 0), 0.5)
    assert mask.factor < -1
    assert not mask.keeps_nothing
    assert mask.share == 1


def test_gaussian_layer_mean_and_variance_over_many_steps():
    steps, rate = 5000, 0.7
    factors = [gaussian_block_mask(stream_key(0, "layer.0", step), rate).factor for step in range(steps)]
    variance = rate / (1 - rate)
    mean = sum(factors) / steps
    assert abs(mean - 1) < 5 * math.sqrt(variance / steps)
    assert abs(sum((factor - mean) ** 2 for factor in factors) / steps - variance) < 5 * variance * math.sqrt(
        2 / steps
    )


@pytest.mark.parametrize("constructor", [bernoulli_block_mask, gaussian_block_mask])
def test_a_layer_mask_is_one_number_for_all_entries(constructor):
    for step in range(10):
        arguments = (stream_key(0, step), 0.5, True)[: 3 if constructor is bernoulli_block_mask else 2]
        mask, gradient = constructor(*arguments), normal(4, 5)
        assert torch.equal(mask.apply_(gradient.clone()), gradient * mask.factor)
