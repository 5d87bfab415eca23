import itertools

import pytest

from peft_sparsegrad.functional import core_shape, num_trained_values

SHAPES = [(10, 20), (20, 2), (16, 4), (1, 1), (1, 500), (33, 31), (256, 256), (768, 3072), (4096, 11008), (14336, 99)]
DENSITIES = [0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]


@pytest.mark.parametrize(("shape", "density"), list(itertools.product(SHAPES, DENSITIES)))
def test_auto_holds_the_values_and_stays_within_the_layer(shape, density):
    k = num_trained_values(*shape, density)
    r_out, r_in = core_shape(*shape, k, "auto")
    assert r_out * r_in >= k
    assert 1 <= r_out <= shape[0]
    assert 1 <= r_in <= shape[1]


@pytest.mark.parametrize(("out_features", "in_features"), [(768, 3072), (4096, 11008), (11008, 4096)])
def test_auto_is_nearly_square_and_a_little_wider_than_the_values_need(out_features, in_features):
    k = num_trained_values(out_features, in_features, 0.01)
    r_out, r_in = core_shape(out_features, in_features, k, "auto")
    assert max(r_out, r_in) <= 1.1 * min(r_out, r_in)
    assert 1.2 * k <= r_out * r_in <= 2 * k


@pytest.mark.parametrize("num_values", [1, 7, 200])
def test_auto_of_a_narrow_layer_uses_its_long_side(num_values):
    r_out, r_in = core_shape(100, 2, num_values, "auto")
    assert r_out * r_in >= num_values
    assert r_in <= 2


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ("full", (20, 30)),
        (12, (12, 12)),
        (25, (20, 25)),
        ((8, 16), (8, 16)),
        ((1000, 16), (20, 16)),
        ((8, 1000), (8, 30)),
    ],
)
def test_ranks_that_were_asked_for(rank, expected):
    assert core_shape(20, 30, 100, rank) == expected


@pytest.mark.parametrize("rank", [9, (10, 9), (1, 30)])
def test_core_too_small_for_the_values(rank):
    with pytest.raises(ValueError, match=r"cannot hold 100 values: raise `rank` to at least 10, or lower `density`"):
        core_shape(20, 30, 100, rank)


def test_smallest_rank_that_the_error_names_works():
    assert core_shape(20, 30, 100, 10) == (10, 10)
    assert core_shape(20, 30, 101, 11) == (11, 11)


@pytest.mark.parametrize("rank", ["auto", "full", 20])
def test_more_values_than_entries(rank):
    with pytest.raises(ValueError, match=r"601 values do not fit into a weight of shape \(20, 30\)"):
        core_shape(20, 30, 601, rank)


@pytest.mark.parametrize(
    ("shape", "density", "num_values", "expected"),
    [
        ((100, 200), 0.01, None, 200),
        ((100, 200), 1.0, None, 20_000),
        ((100, 200), 0.01, 3, 3),
        ((16, 4), 0.01, None, 8),
        ((2, 3), 0.01, None, 6),
        ((30, 31), 0.5, None, 465),
    ],
)
def test_number_of_values(shape, density, num_values, expected):
    assert num_trained_values(*shape, density, num_values) == expected
