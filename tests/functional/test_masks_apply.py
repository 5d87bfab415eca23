"""What `apply_` makes of a gradient: zeros where nothing is kept, and the rest scaled, in place."""

import math

import pytest
import torch
from mask_tools import ALL_MASKS, CPU, DTYPES, KEY, MASKS, RATES, literal_draws, normal

from peft_sparsegrad.functional import (
    GradientMask,
    bernoulli_block_mask,
    bernoulli_mask,
    block_sets,
    gaussian_block_mask,
    gaussian_mask,
    masks,
    set_mask,
    stream_key,
    streams,
)
from peft_sparsegrad.functional.masks import normal_table
from peft_sparsegrad.functional.streams import DRAWS, draws


@pytest.mark.parametrize("rate", RATES)
def test_the_scale_makes_up_for_the_share_that_is_kept(rate):
    mask = bernoulli_mask(KEY, rate, True)
    assert mask.factor == 1 / mask.share
    assert mask.factor * mask.share == pytest.approx(1, rel=1e-15)
    assert mask.factor == pytest.approx(1 / (1 - rate), rel=0.01)
    assert bernoulli_mask(KEY, rate, False).factor == 1


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_scaled_gradient_is_unbiased_over_the_steps(rate):
    steps, entries = 200, 1001
    total = torch.zeros(entries, dtype=torch.float64)
    for step in range(steps):
        total += bernoulli_mask(stream_key(0, "w", step), rate, True).apply_(torch.ones(entries, dtype=torch.float64))
    sigma = math.sqrt(rate / (1 - rate) / steps)
    assert (total / steps - 1).abs().max() <= 6 * sigma + (rate > 0.9)  # single entries; 0.99: two kept in 200 steps
    assert abs(total.mean() / steps - 1) <= 5 * sigma / math.sqrt(entries) + 1e-12


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shape", [(5,), (7, 9), (3, 5, 2, 2), (), (0,), (4, 0), (1, 1)])
@DTYPES
def test_apply_multiplies_what_is_kept_and_zeroes_the_rest(dtype, shape, scale):
    gradient, mask = normal(*shape, dtype=dtype), bernoulli_mask(KEY, 0.5, scale)
    kept = [draw >= DRAWS // 2 for draw in literal_draws(KEY, gradient.numel())]
    kept = torch.tensor(kept, dtype=torch.bool).view(shape)
    expected = torch.where(kept, gradient * (2 if scale else 1), 0)
    masked = mask.apply_(gradient)
    assert torch.equal(masked, expected)
    assert torch.equal(masked[~kept], torch.zeros_like(masked[~kept]))
    assert masked.dtype == dtype
    assert masked.shape == shape


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_multiplies_by_the_factor(dtype, rate):
    gradient, mask = normal(1001, dtype=dtype), bernoulli_mask(KEY, rate, True)
    expected = torch.where(mask.keep(gradient.shape, CPU), gradient * mask.factor, 0)
    assert torch.equal(mask.apply_(gradient), expected)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
def test_a_bfloat16_gradient_is_scaled_without_bias(rate):
    """The factor itself must not be rounded to bfloat16: products round either way, a factor always the same way."""
    gradient, mask = torch.linspace(1, 2, 50_000, dtype=torch.float64).bfloat16(), bernoulli_mask(KEY, rate, True)
    kept = mask.keep(gradient.shape, CPU)
    ratio = (mask.apply_(gradient.clone())[kept].double() / gradient[kept].double()).mean().item()
    assert ratio == pytest.approx(mask.factor, rel=6e-4)  # bfloat16 has 128 values to round between 1 and 2


DROPPING = pytest.mark.parametrize(
    "mask", [MASKS[name] for name in ("nothing", "bernoulli", "bernoulli unscaled", "first set", "middle set")]
)


@ALL_MASKS
@pytest.mark.parametrize("shape", [(13,), (5, 4), (2, 3, 3, 3)])
@DTYPES
def test_apply_works_in_place(mask, dtype, shape):
    gradient = normal(*shape, dtype=dtype)
    memory = gradient.data_ptr()
    masked = mask.apply_(gradient)
    assert masked is gradient
    assert masked.data_ptr() == memory
    assert (masked.shape, masked.dtype) == (shape, dtype)


@ALL_MASKS
def test_the_same_mask_is_drawn_each_time(mask):
    gradient = normal(7, 9)
    assert torch.equal(mask.apply_(gradient.clone()), mask.apply_(gradient.clone()))
    assert torch.equal(mask.keep(gradient.shape, CPU), mask.keep(gradient.shape, CPU))


@ALL_MASKS
def test_the_shape_does_not_matter(mask):
    gradient = normal(6, 10)
    assert torch.equal(mask.apply_(gradient.clone().view(-1)).view(6, 10), mask.apply_(gradient.clone()))
    assert torch.equal(mask.keep(torch.Size([60]), CPU).view(6, 10), mask.keep(gradient.shape, CPU))


@ALL_MASKS
@pytest.mark.parametrize("size", [2, 10, 500])
def test_the_chunk_size_does_not_matter(monkeypatch, mask, size):
    gradient = normal(1001)
    masked, keep = mask.apply_(gradient.clone()), mask.keep(gradient.shape, CPU)
    monkeypatch.setattr(streams, "_CHUNK", size)
    assert torch.equal(mask.apply_(gradient.clone()), masked)
    assert torch.equal(mask.keep(gradient.shape, CPU), keep)


def test_tensors_of_several_chunks():
    count = 2 * streams._CHUNK + 3
    expected = draws(KEY, count) + DRAWS // 2 >= 6554
    assert torch.equal(bernoulli_mask(KEY, 0.1, True).keep(torch.Size([count]), CPU), expected)
    assert torch.equal(bernoulli_mask(KEY, 0.1, False).apply_(torch.ones(count)), expected.float())


def test_a_mask_that_chooses_works_on_a_part_of_memory_only():
    memory = torch.ones(20)
    bernoulli_mask(KEY, 0.9999, True).apply_(memory[5:15])
    assert memory[:5].tolist() == memory[15:].tolist() == [1.0] * 5
    assert not memory[5:15].any()


@DROPPING
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@DTYPES
def test_what_is_dropped_is_zero_even_if_it_was_not_finite(mask, dtype, bad):
    gradient = torch.ones(100, dtype=dtype)
    dropped = int((~mask.keep(gradient.shape, CPU)).nonzero()[0])
    gradient[dropped] = bad
    masked = mask.apply_(gradient)
    assert masked[dropped] == 0
    assert masked.isfinite().all()


def odd_values(dtype: torch.dtype) -> torch.Tensor:
    tiny = torch.finfo(dtype).smallest_normal
    return torch.tensor([0.0, -0.0, 1.5, -1.5, math.inf, -math.inf, math.nan, tiny, -tiny, tiny / 4], dtype=dtype)


@pytest.mark.parametrize(
    "mask",
    [
        GradientMask(),
        GradientMask(1.0, KEY),
        bernoulli_mask(KEY, 0.0, True),
        bernoulli_mask(KEY, 0.0, False),
        gaussian_mask(KEY, 0.0),
        set_mask(KEY, 0, 0, 1),
        set_mask(KEY, 0, 6, 7),
        bernoulli_block_mask(KEY, 0.0, True),
        gaussian_block_mask(KEY, 0.0),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)]
)
def test_a_mask_that_drops_nothing_leaves_every_bit(mask, dtype, bits):
    gradient = odd_values(dtype)
    assert torch.equal(mask.apply_(gradient.clone()).view(bits), gradient.view(bits))
    assert mask.key is None, "and draws nothing"


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "middle set", "layer", "gaussian layer"])
def test_the_global_random_state_is_untouched(name):
    before = torch.get_rng_state()
    MASKS[name].apply_(torch.ones(100))
    bernoulli_block_mask(KEY, 0.5, True)
    gaussian_block_mask(KEY, 0.5)
    block_sets(5, 2, "without-replacement", 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ALL_MASKS
@DTYPES
def test_a_gpu_masks_as_a_cpu_does(mask, dtype):
    gradient = normal(513, 1001, dtype=dtype)
    assert torch.equal(mask.apply_(gradient.cuda()).cpu(), mask.apply_(gradient.clone()))
    assert torch.equal(mask.keep(gradient.shape, torch.device("cuda")).cpu(), mask.keep(gradient.shape, CPU))
    assert torch.equal(masks.normal_table(torch.device("cuda")).cpu(), normal_table(CPU))
