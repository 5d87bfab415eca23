import itertools

import pytest

from peft_sparsegrad.functional import core_ranks, core_shape, num_trained_values

SHAPES = [(10, 20), (20, 2), (16, 4), (1, 1), (1, 500), (33, 31), (256, 256), (768, 3072), (4096, 11008), (14336, 99)]
DENSITIES = [0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]


def auto(out_features: int, in_features: int, k: int, slack: float = 6.0) -> tuple[int | None, int | None]:
    return core_ranks(out_features, in_features, k, "auto", slack)


@pytest.mark.parametrize("slack", [1.0, 1.5, 6.0])
@pytest.mark.parametrize(("shape", "density"), list(itertools.product(SHAPES, DENSITIES)))
def test_auto_holds_the_values_and_stays_within_the_layer(shape, density, slack):
    k = num_trained_values(*shape, density)
    ranks = auto(*shape, k, slack)
    r_out, r_in = core_shape(*shape, ranks)
    assert r_out * r_in >= k
    assert 1 <= r_out <= shape[0]
    assert 1 <= r_in <= shape[1]
    assert ranks == (None, r_in)


@pytest.mark.parametrize(
    ("shape", "k", "slack", "expected"),
    [
        ((40, 16), 64, 6, (None, 10)),  # 40 · 10 ≥ 6 · 64 > 40 · 9
        ((16, 40), 64, 6, (None, 24)),  # the input side where it is the wider one, too
        ((20, 20), 30, 6, (None, 9)),
        ((1, 1), 1, 6, (None, 1)),
        ((40, 16), 64, 1, (None, 2)),
        ((40, 16), 64, 1.5, (None, 3)),
        ((40, 16), 640, 6, (None, 16)),
        ((16, 40), 200, 1e9, (None, 40)),
        ((100, 90), 31 * 100, 1, (None, 31)),  # small ranks are exact
        ((100, 90), 32 * 100, 1, (None, 32)),
        ((100, 90), 32 * 100 + 1, 1, (None, 40)),  # larger ones a multiple of 8
        ((100, 90), 40 * 100 + 1, 1, (None, 48)),
        ((100, 90), 89 * 100, 1, (None, 90)),  # and never more than there are
        ((3072, 768), 23593, 6, (None, 48)),
        ((4096, 11008), 450888, 6, (None, 664)),
        ((4096, 11008), 450888, 4, (None, 448)),
    ],
)
def test_auto(shape, k, slack, expected):
    assert auto(*shape, k, slack) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((40, 16), (None, 10)), ((16, 40), (10, None)), ((20, 20), (None, 20)), ((4096, 11008), (248, None))],
)
def test_narrower_is_that_of_earlier_releases(shape, expected):
    k = {40 * 16: 64, 400: 64, 4096 * 11008: 450888}[shape[0] * shape[1]]
    assert core_ranks(*shape, k, "narrower", 6.0) == expected


@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768), (4096, 11008), (11008, 4096), (4096, 4096)])
@pytest.mark.parametrize("slack", [1, 2, 6, 20])
def test_auto_gives_the_slack_that_was_asked_for(shape, slack):
    k = num_trained_values(*shape, 0.01)
    r_out, r_in = core_shape(*shape, auto(*shape, k, slack))
    assert slack * k <= r_out * r_in <= 1.25 * slack * k


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ("full", (20, 30)),
        (12, (12, 12)),
        (25, (20, 25)),
        ((8, 16), (8, 16)),
        ((1000, 16), (20, 16)),
        ((8, 1000), (8, 30)),
        ((None, 5), (None, 5)),
        ((4, None), (4, None)),
        ((None, 1000), (None, 30)),
        ((None, None), (None, None)),
    ],
)
@pytest.mark.parametrize("slack", [1.0, 6.0])
def test_ranks_that_were_asked_for(rank, expected, slack):
    assert core_ranks(20, 30, 100, rank, slack) == expected


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [((3, 4), (3, 4)), ((None, 4), (20, 4)), ((3, None), (3, 30)), ((None, None), (20, 30))],
)
def test_side_in_its_own_basis_is_as_wide_as_the_layer(ranks, expected):
    assert core_shape(20, 30, ranks) == expected


@pytest.mark.parametrize("rank", [9, (10, 9), (1, 30), (None, 4), (3, None)])
def test_core_too_small_for_the_values(rank):
    with pytest.raises(ValueError, match=r"cannot hold 100 values: raise `rank` to at least 10, or lower `density`"):
        core_ranks(20, 30, 100, rank, 6.0)


def test_smallest_rank_that_the_error_names_works():
    assert core_ranks(20, 30, 100, 10, 6.0) == (10, 10)
    assert core_ranks(20, 30, 101, 11, 6.0) == (11, 11)


@pytest.mark.parametrize("rank", ["auto", "full", 20, (None, 5)])
def test_more_values_than_entries(rank):
    with pytest.raises(ValueError, match=r"601 values do not fit into a weight of shape \(20, 30\)"):
        core_ranks(20, 30, 601, rank, 6.0)


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
