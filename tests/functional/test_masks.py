"""Which entries a mask keeps, and how large a share of all they are."""

import pytest
import torch
from mask_tools import ALL_MASKS, CPU, KEY, MANY, MASKS, RATES, kept_entries, literal_draws, within_binomial_bounds

from peft_sparsegrad.functional import GradientMask, bernoulli_mask, stream_key
from peft_sparsegrad.functional.streams import DRAWS, Key, draws


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
        assert masked[keep].unique().tolist() == ([] if mask.keeps_nothing else pytest.approx([mask.factor]))


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


def test_a_layer_that_is_dropped_draws_nothing():
    assert GradientMask(0.0, KEY, 5, 600).key is None
    assert GradientMask(1.0, KEY, 600, 5).key is None
