"""Masks of sets, of entries or of layers: disjoint, equal in size, and in the order that is asked for."""

import itertools

import pytest
import torch
from mask_tools import CPU, KEY, MANY, kept_entries, literal_draws, within_binomial_bounds
from scipy import stats

from peft_sparsegrad.functional import block_sets, set_mask, stream_key
from peft_sparsegrad.functional.streams import DRAWS

NUMS_SETS = [1, 2, 3, 7, 10]


@pytest.mark.parametrize("num_sets", NUMS_SETS)
def test_the_set_of_an_entry_is_its_draw_in_equal_parts(num_sets):
    sets = [draw * num_sets // DRAWS for draw in literal_draws(KEY, 5001)]
    for first, last in itertools.combinations_with_replacement(range(num_sets), 2):
        assert kept_entries(set_mask(KEY, first, last, num_sets), 5001) == [first <= own <= last for own in sets]


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
