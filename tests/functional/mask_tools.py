"""A mask of every kind, draws written out, and random gradients."""

import math

import pytest
import torch

from peft_sparsegrad.functional import (
    GradientMask,
    bernoulli_block_mask,
    bernoulli_mask,
    gaussian_block_mask,
    gaussian_mask,
    set_mask,
    stream_key,
)
from peft_sparsegrad.functional.streams import DRAWS, Key, draws

CPU = torch.device("cpu")
KEY = stream_key(0, "layer.weight", 1)
RATES = [0.0, 1e-9, 1e-5, 0.1, 0.3, 0.5, 0.9, 0.999]
MANY = 1 << 20


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def literal_draws(key: Key, count: int) -> list[int]:
    return [draw + DRAWS // 2 for draw in draws(key, count).tolist()]


def kept_entries(mask: GradientMask, count: int) -> list[bool]:
    return mask.keep(torch.Size([count]), CPU).tolist()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def within_binomial_bounds(number: float, trials: int, probability: float, sigmas: float = 5) -> bool:
    return abs(number - trials * probability) <= sigmas * math.sqrt(trials * probability * (1 - probability))


MASKS = {
    "all": GradientMask(),
    "scaled": GradientMask(2.0),
    "nothing": GradientMask(0.0),
    "bernoulli": bernoulli_mask(KEY, 0.7, True),
    "bernoulli unscaled": bernoulli_mask(KEY, 0.7, False),
    "bernoulli 0": bernoulli_mask(KEY, 0.0, True),
    "gaussian": gaussian_mask(KEY, 0.5),
    "first set": set_mask(KEY, 0, 0, 3),
    "middle set": set_mask(KEY, 1, 1, 3),
    "last sets": set_mask(KEY, 1, 2, 3),
    "all sets": set_mask(KEY, 0, 2, 3),
    "layer": bernoulli_block_mask(Key(60_000, 0), 0.5, True),
    "layer dropped": bernoulli_block_mask(Key(10, 0), 0.5, True),
    "gaussian layer": gaussian_block_mask(KEY, 0.5),
}
ALL_MASKS = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
