import itertools
import math
from statistics import NormalDist

import pytest
import torch
from scipy import stats

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
from peft_sparsegrad.functional.streams import DRAWS, Key, draws, single_draw

CPU = torch.device("cpu")
KEY = stream_key(0, "layer.weight", 1)
RATES = [0.0, 1e-9, 1e-5, 0.1, 0.3, 0.5, 0.9, 0.999]
MANY = 1 << 20
NUMS_SETS = [1, 2, 3, 7, 10]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def literal_draws(key: Key, count: int) -> list[int]:
    return [draw + DRAWS // 2 for draw in draws(key, count).tolist()]


def kept_entries(mask: GradientMask, count: int) -> list[bool]:
    return mask.keep(torch.Size([count]), CPU).tolist()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def within_binomial_bounds(number: float, trials: int, probability: float, sigmas: float = 5) -> bool:
    return abs(number - trials * probability) <= sigmas * math.sqrt(trials * probability * (1 - probability))


# What is kept


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("scale", [True, False])
def test_bernoulli_drops_the_smallest_draws(rate, scale):
    dropped = round(rate * DRAWS)
    expected = [draw >= dropped for draw in literal_draws(KEY, 5001)]
    assert kept_entries(bernoulli_mask(KEY, rate, scale), 5001) == expected


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, DRAWS),
        (0, 1),
        (0, DRAWS // 2),
        (0, DRAWS - 1),
        (1, DRAWS),
        (DRAWS // 2, DRAWS),
        (DRAWS - 1, DRAWS),
        (1, DRAWS - 1),
        (1000, 40_000),
        (DRAWS // 2, DRAWS // 2 + 1),
        (300, 300),
        (400, 300),
        (0, 0),
        (DRAWS, DRAWS),
    ],
)
def test_an_entry_is_kept_if_its_draw_is_within_the_limits(low, high):
    every_value = Key(0, 0)
    drawn = draws(every_value, MANY) + DRAWS // 2
    assert drawn.unique().numel() == DRAWS, "the limits themselves must be drawn"
    kept = GradientMask(1.0, every_value, low, high).keep(torch.Size([MANY]), CPU)
    assert torch.equal(kept, (low <= drawn) & (drawn < high))


@pytest.mark.parametrize("num_sets", NUMS_SETS)
def test_the_set_of_an_entry_is_its_draw_in_equal_parts(num_sets):
    sets = [draw * num_sets // DRAWS for draw in literal_draws(KEY, 5001)]
    for first, last in itertools.combinations_with_replacement(range(num_sets), 2):
        assert kept_entries(set_mask(KEY, first, last, num_sets), 5001) == [first <= own <= last for own in sets]


def test_without_a_key_everything_is_kept():
    assert all(kept_entries(GradientMask(3.0, None, 5, 6), 100))
    assert GradientMask(3.0, None, 5, 6).share == 1


def test_a_factor_of_zero_keeps_nothing():
    assert not any(kept_entries(GradientMask(0.0, KEY), 100))
    assert GradientMask(0.0, KEY, 5, 60_000).keeps_nothing


@pytest.mark.parametrize("rate", RATES)
def test_bernoulli_rate_is_within_binomial_bounds(rate):
    share = round(rate * DRAWS) / DRAWS
    for step in range(3):
        kept = bernoulli_mask(stream_key(0, "w", step), rate, True).keep(torch.Size([MANY]), CPU).sum().item()
        assert within_binomial_bounds(MANY - kept, MANY, share)


@pytest.mark.parametrize("rate", RATES)
def test_bernoulli_rate_is_exact_to_one_draw(rate):
    assert abs(1 - bernoulli_mask(KEY, rate, True).share - rate) <= 0.5 / DRAWS


def test_a_rate_next_to_one_keeps_one_draw():
    mask = bernoulli_mask(KEY, 0.9999999, True)
    assert mask.share == 1 / DRAWS
    assert mask.factor == DRAWS
    assert not mask.keeps_nothing


# What it is multiplied by


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
DROPPING = pytest.mark.parametrize(
    "mask", [MASKS[name] for name in ("nothing", "bernoulli", "bernoulli unscaled", "first set", "middle set")]
)


@ALL_MASKS
def test_what_a_mask_says_of_itself_is_what_it_does(mask):
    entries = torch.Size([1 << 18])
    keep, masked = mask.keep(entries, CPU), mask.apply_(torch.ones(entries))
    assert keep.dtype == torch.bool
    assert keep.shape == entries
    assert torch.equal(masked != 0, keep)
    assert mask.keeps_nothing == (not keep.any())
    assert mask.chooses == (keep.any() and not keep.all())
    assert within_binomial_bounds(keep.sum().item(), entries[0], mask.share)
    if not mask.noise:
        assert masked[keep].unique().tolist() == [] if mask.keeps_nothing else [mask.factor]


@pytest.mark.parametrize(
    ("name", "share", "keeps_nothing", "chooses"),
    [
        ("all", 1, False, False),
        ("scaled", 1, False, False),
        ("nothing", 0, True, False),
        ("bernoulli", (DRAWS - round(0.7 * DRAWS)) / DRAWS, False, True),
        ("bernoulli 0", 1, False, False),
        ("gaussian", 1, False, False),
        ("first set", 21846 / DRAWS, False, True),
        ("middle set", 21845 / DRAWS, False, True),
        ("last sets", (21845 + 21845) / DRAWS, False, True),
        ("all sets", 1, False, False),
        ("layer", 1, False, False),
        ("layer dropped", 0, True, False),
    ],
)
def test_share_keeps_nothing_and_chooses(name, share, keeps_nothing, chooses):
    mask = MASKS[name]
    assert (mask.share, mask.keeps_nothing, mask.chooses) == (share, keeps_nothing, chooses)
    assert isinstance(mask.share, float)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, DRAWS // 2), (5, DRAWS), (5, 105), (DRAWS - 1, DRAWS)])
def test_share_is_the_part_of_the_draws_that_are_kept(low, high):
    assert GradientMask(1.0, KEY, low, high).share == (high - low) / DRAWS


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


def test_a_layer_that_is_dropped_draws_nothing():
    assert GradientMask(0.0, KEY, 5, 600).key is None
    assert GradientMask(1.0, KEY, 600, 5).key is None


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "middle set", "layer", "gaussian layer"])
def test_the_global_random_state_is_untouched(name):
    before = torch.get_rng_state()
    MASKS[name].apply_(torch.ones(100))
    bernoulli_block_mask(KEY, 0.5, True)
    gaussian_block_mask(KEY, 0.5)
    block_sets(5, 2, "without-replacement", 0)
    assert torch.equal(torch.get_rng_state(), before)


# Gaussian noise


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


# Sets


@pytest.mark.parametrize("num_sets", NUMS_SETS)
def test_sets_are_disjoint_and_exhaustive(num_sets):
    kept = [set_mask(KEY, own, own, num_sets).keep(torch.Size([100_003]), CPU) for own in range(num_sets)]
    assert torch.equal(torch.stack(kept).sum(0), torch.ones(100_003, dtype=torch.int64))
    assert sum(set_mask(KEY, own, own, num_sets).share for own in range(num_sets)) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("num_sets", NUMS_SETS)
def test_sets_are_equal_in_size_within_binomial_bounds(num_sets):
    for own in range(num_sets):
        mask = set_mask(KEY, own, own, num_sets)
        assert abs(mask.share - 1 / num_sets) <= 1 / DRAWS
        assert within_binomial_bounds(mask.keep(torch.Size([MANY]), CPU).sum().item(), MANY, 1 / num_sets)


@pytest.mark.parametrize("num_sets", NUMS_SETS)
def test_accumulating_sets_nest_and_are_everything_in_the_last_epoch(num_sets):
    kept = [set_mask(KEY, 0, epoch, num_sets).keep(torch.Size([10_001]), CPU) for epoch in range(num_sets)]
    for earlier, later in itertools.pairwise(kept):
        assert (later | ~earlier).all()
        assert later.sum() > earlier.sum()
    assert kept[-1].all()


def test_sets_are_not_scaled():
    assert set_mask(KEY, 1, 1, 3).factor == 1


def test_more_sets_than_draws_leave_some_empty():
    assert sum(set_mask(KEY, own, own, 3 * DRAWS).keeps_nothing for own in range(30)) == 20


# Layers


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


SELECTIONS = ["top-down", "bottom-up", "without-replacement"]
SIZES = [(1, 1), (5, 1), (5, 2), (6, 3), (7, 3), (12, 5), (24, 10), (3, 10), (2, 3), (1, 4)]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("num_layers", "num_sets"), SIZES)
def test_layer_sets_are_equal_in_size_up_to_one(num_layers, num_sets, selection):
    sets = block_sets(num_layers, num_sets, selection, 3)
    assert len(sets) == num_layers
    sizes = [sets.count(own) for own in range(num_sets)]
    assert sum(sizes) == num_layers
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("num_layers", "num_sets"), SIZES)
def test_top_down_is_bottom_up_from_the_other_end(num_layers, num_sets):
    bottom_up = block_sets(num_layers, num_sets, "bottom-up", 0)
    assert bottom_up == sorted(bottom_up)
    assert bottom_up[0] == 0, "the first epoch trains something"
    assert block_sets(num_layers, num_sets, "top-down", 0) == bottom_up[::-1]


@pytest.mark.parametrize(
    ("num_layers", "num_sets", "bottom_up"),
    [(4, 2, [0, 0, 1, 1]), (5, 2, [0, 0, 0, 1, 1]), (7, 3, [0, 0, 0, 1, 1, 2, 2]), (2, 5, [0, 2]), (3, 1, [0, 0, 0])],
)
def test_layer_sets_in_order(num_layers, num_sets, bottom_up):
    assert block_sets(num_layers, num_sets, "bottom-up", 0) == bottom_up
    assert block_sets(num_layers, num_sets, "top-down", 0) == bottom_up[::-1]


@pytest.mark.parametrize(("num_layers", "num_sets"), SIZES)
def test_without_replacement_is_the_order_of_the_layers_keys(num_layers, num_sets):
    order = sorted((stream_key(8, "order of layers", layer), layer) for layer in range(num_layers))
    position = {layer: place for place, (_, layer) in enumerate(order)}
    expected = [position[layer] * num_sets // num_layers for layer in range(num_layers)]
    assert block_sets(num_layers, num_sets, "without-replacement", 8) == expected


def test_random_order_depends_on_the_seed_and_nothing_else():
    orders = [tuple(block_sets(12, 12, "without-replacement", seed)) for seed in range(20)]
    assert len(set(orders)) == 20
    torch.manual_seed(5)
    assert orders == [tuple(block_sets(12, 12, "without-replacement", seed)) for seed in range(20)]


def test_random_order_of_a_release():
    assert block_sets(6, 3, "without-replacement", 0) == [0, 1, 2, 2, 1, 0]


def test_every_order_is_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        order = tuple(block_sets(3, 3, "without-replacement", seed))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ALL_MASKS
@DTYPES
def test_a_gpu_masks_as_a_cpu_does(mask, dtype):
    gradient = normal(513, 1001, dtype=dtype)
    assert torch.equal(mask.apply_(gradient.cuda()).cpu(), mask.apply_(gradient.clone()))
    assert torch.equal(mask.keep(gradient.shape, torch.device("cuda")).cpu(), mask.keep(gradient.shape, CPU))
    assert torch.equal(masks.normal_table(torch.device("cuda")).cpu(), normal_table(CPU))


REMEMBERED = pytest.mark.parametrize("make", [lambda: bernoulli_mask(KEY, 0.3, True), lambda: set_mask(KEY, 1, 1, 3)])


@REMEMBERED
@DTYPES
def test_a_remembered_mask_does_what_it_did_when_it_was_drawn(make, dtype):
    count = 4 * streams._CHUNK + 3
    gradient, before, mask = normal(count, dtype=dtype), normal(count, dtype=dtype).flip(0), make()
    mask.is_remembered = True
    for _ in range(3):
        restored = gradient.clone()
        mask.restore_(restored, before)
        assert torch.equal(restored, torch.where(make().keep(gradient.shape, CPU), gradient, before))
        assert torch.equal(mask.apply_(gradient.clone()), make().apply_(gradient.clone()))
        assert torch.equal(mask.keep(gradient.shape, CPU), make().keep(gradient.shape, CPU))


@REMEMBERED
def test_a_remembered_mask_is_drawn_once(make, monkeypatch):
    mask, calls = make(), []
    draw = masks.draw_in_parts
    monkeypatch.setattr(masks, "draw_in_parts", lambda *args: calls.append(1) or draw(*args))
    for remembers, expected in ((False, 3), (True, 4)):
        mask.is_remembered = remembers
        for _ in range(3):
            mask.apply_(torch.ones(50))
        assert len(calls) == expected


@DTYPES
@pytest.mark.parametrize("shape", [(), (5,), (7, 9), (3, 5, 2, 2)])
def test_restore_puts_back_what_is_not_kept(dtype, shape):
    changed, before, mask = normal(*shape, dtype=dtype), -normal(*shape, dtype=dtype), bernoulli_mask(KEY, 0.5, True)
    expected = torch.where(mask.keep(changed.shape, CPU), changed, before)
    mask.restore_(changed, before)
    assert torch.equal(changed, expected)


def test_restore_of_memory_in_another_order():
    changed, before, mask = normal(6, 4).T, normal(4, 6), bernoulli_mask(KEY, 0.5, True)
    expected = torch.where(mask.keep(changed.shape, CPU), changed, before)
    mask.restore_(changed, before)
    assert torch.equal(changed, expected)


def test_restore_of_what_keeps_nothing_or_everything():
    for mask, which in ((GradientMask(0.0), 1), (GradientMask(1.0), 0)):
        tensors = [normal(9), normal(9) + 1]
        expected = tensors[which].clone()
        mask.restore_(*tensors)
        assert torch.equal(tensors[0], expected)
