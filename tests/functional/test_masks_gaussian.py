"""Masks of Gaussian noise, and the table of normal numbers that they look up."""

import math
from statistics import NormalDist

import pytest
import torch
from mask_tools import CPU, DTYPES, KEY, MANY, literal_draws, normal
from scipy import stats

from peft_sparsegrad.functional import GradientMask, bernoulli_mask, gaussian_block_mask, gaussian_mask
from peft_sparsegrad.functional.masks import normal_table
from peft_sparsegrad.functional.streams import DRAWS


def test_normal_table_is_that_of_the_quantiles():
    exact = torch.tensor([NormalDist().inv_cdf((draw + 0.5) / DRAWS) for draw in range(DRAWS)], dtype=torch.float64)
    exact /= exact.square().mean().sqrt()
    table = normal_table(CPU)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), exact, rtol=2e-7, atol=1e-10)


def test_normal_table_has_mean_0_and_variance_1():
    table = normal_table(CPU).double()
    assert abs(table.mean()) < 1e-9
    assert abs(table.square().mean() - 1) < 1e-7


def test_normal_table_does_not_depend_on_the_default_device_or_dtype():
    normal_table.cache_clear()
    expected = normal_table(CPU).clone()
    normal_table.cache_clear()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert torch.equal(normal_table(CPU), expected)
    finally:
        torch.set_default_dtype(default)
        normal_table.cache_clear()


@pytest.mark.parametrize("rate", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_gaussian_is_a_look_up_in_the_table(rate):
    gradient = normal(3001)
    epsilon = torch.tensor([normal_table(CPU)[draw] for draw in literal_draws(KEY, 3001)])
    expected = gradient * (1 + epsilon * math.sqrt(rate / (1 - rate)))
    assert torch.equal(gaussian_mask(KEY, rate).apply_(gradient.clone()), expected)


def test_gaussian_noise_is_multiplied_by_the_factor():
    expected = gaussian_mask(KEY, 0.3).apply_(torch.ones(100)) * 2.5
    assert torch.equal(GradientMask(2.5, KEY, noise=gaussian_mask(KEY, 0.3).noise).apply_(torch.ones(100)), expected)


def test_gaussian_noise_leaves_the_table_alone():
    before = normal_table(CPU).clone()
    gaussian_mask(KEY, 0.5).apply_(torch.ones(1000))
    gaussian_block_mask(KEY, 0.5)
    assert torch.equal(normal_table(CPU), before)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_gaussian_has_the_mean_and_variance_of_a_scaled_mask(rate):
    variance = rate / (1 - rate)
    noise = gaussian_mask(KEY, rate).apply_(torch.ones(MANY, dtype=torch.float64))
    assert abs(noise.mean() - 1) < 5 * math.sqrt(variance / MANY)
    assert abs(noise.var() - variance) < 5 * variance * math.sqrt(2 / MANY)
    bernoulli = bernoulli_mask(KEY, rate, True).apply_(torch.ones(MANY, dtype=torch.float64))
    assert bernoulli.var() == pytest.approx(variance, rel=0.02)


def test_gaussian_is_gaussian():
    noise = gaussian_mask(KEY, 0.5).apply_(torch.ones(100_000, dtype=torch.float64)) - 1
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3


@DTYPES
def test_gaussian_in_other_dtypes_is_that_of_float32_rounded(dtype):
    noise = gaussian_mask(KEY, 0.5).apply_(torch.ones(1000))
    assert torch.equal(gaussian_mask(KEY, 0.5).apply_(torch.ones(1000, dtype=dtype)), noise.to(dtype))
