import pytest
import torch

from peft_sparsegrad.functional import (
    keep_largest,
    renew_support,
    select_support,
    spread_support,
)


def random_support(num_entries: int, k: int) -> torch.Tensor:
    return torch.randperm(num_entries, generator=torch.Generator().manual_seed(0))[:k].sort().values


def test_select_takes_the_highest_scores_in_order_of_position():
    score = torch.tensor([[0.5, 9.0, -1.0], [7.0, 0.0, 8.0]])
    selected = select_support(score, 3)
    assert selected.tolist() == [1, 3, 5]
    assert selected.dtype == torch.int64


def test_select_on_ties_is_deterministic():
    score = torch.randint(0, 3, (40, 50), generator=torch.Generator().manual_seed(0)).float()
    selected = select_support(score, 900)
    assert selected.unique().numel() == 900
    assert score.flatten()[selected].min() >= 1
    for again in (score.clone(), score.T.contiguous().T, score.clone().requires_grad_()):
        assert torch.equal(select_support(again, 900), selected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_select_refuses_scores_that_are_not_finite(bad):
    score = torch.ones(4, 5)
    score[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        select_support(score, 3)


@pytest.mark.parametrize(
    ("num_entries", "k"), [(1, 1), (10, 10), (10, 9), (100, 7), (101, 100), (5000, 333), (676_000, 450_887)]
)
def test_spread_support_is_a_support_in_every_stretch(num_entries, k):
    indices = spread_support(num_entries, k)
    assert indices.dtype == torch.int64
    assert indices.shape == (k,)
    assert (indices.diff() > 0).all()
    assert indices[0] >= 0
    assert indices[-1] < num_entries
    stretch = torch.arange(k, dtype=torch.float64) * num_entries / k
    assert (indices - stretch).abs().max() <= num_entries / k + 1


@pytest.mark.parametrize("num_entries", [27, 31, 47, 96, 1000])
def test_spread_support_of_every_size(num_entries):
    """A stretch ends where the next one begins, whatever num_entries / k rounds to."""
    for k in range(1, num_entries + 1):
        indices = spread_support(num_entries, k).tolist()
        assert all(i * num_entries // k <= index < (i + 1) * num_entries // k for i, index in enumerate(indices))


def test_spread_support_is_the_same_each_time_and_leaves_the_global_random_state():
    torch.manual_seed(5)
    first, state = spread_support(5000, 333), torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(spread_support(5000, 333), first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


# Growing back: the twins below go through the entries one by one.


def slow_renewal(indices: list[int], values: list[float], score: list[float], fraction: float) -> list[int]:
    """Drop the smallest values, let the best entries grow that hold no value any more, and give them free slots."""
    by_size = sorted(zip(indices, values, strict=True), key=lambda pair: abs(pair[1]))
    number = int(fraction * len(indices))
    survivors = {index for index, _ in by_size[number:]}
    free = [index for index in range(len(score)) if index not in survivors]
    grown = sorted(free, key=lambda index: -score[index])[:number]
    new = iter(sorted(set(grown) - set(indices)))
    return [index if index in survivors or index in grown else next(new) for index in indices]


def random_renewal(num_entries: int, k: int, seed: int = 0):
    """Positions in any order, values (k,) and a score of every entry, without ties, in float64."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(num_entries, generator=generator)[:k]
    values = torch.randn(k, dtype=torch.float64, generator=generator)
    return indices, values, torch.randn(num_entries, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.34, 0.5, 1.0])
@pytest.mark.parametrize(("num_entries", "k"), [(12, 1), (12, 3), (40, 10), (12, 12), (600, 101)])
@pytest.mark.parametrize("seed", [0, 1])
def test_renewal_is_the_slow_one(num_entries, k, fraction, seed):
    indices, values, score = random_renewal(num_entries, k, seed)
    before = [tensor.clone() for tensor in (indices, values, score)]
    renewed = renew_support(indices, values, score, fraction)
    assert renewed.tolist() == slow_renewal(indices.tolist(), values.tolist(), score.tolist(), fraction)
    assert renewed.dtype == torch.int64
    for tensor, old in zip((indices, values, score), before, strict=True):
        assert torch.equal(tensor, old), "the arguments are left alone"
    shape = (3, num_entries // 3) if num_entries % 3 == 0 else (2, num_entries // 2)
    assert torch.equal(renew_support(indices, values.requires_grad_(), score.view(shape), fraction), renewed)


def test_renewal_without_a_share_keeps_the_support():
    indices, values, score = random_renewal(40, 10)
    assert torch.equal(renew_support(indices, values, score, 0.0), indices)
    assert torch.equal(renew_support(indices[:3], values[:3], score, 0.3), indices[:3]), "0.9 of a value is none"


def test_renewal_of_everything_is_the_selection():
    indices, values, score = random_renewal(40, 10)
    assert torch.equal(renew_support(indices, values, score, 1.0).sort().values, select_support(score, 10))


def test_signs_of_the_values_do_not_matter_and_scores_are_compared_as_they_are():
    indices, score = torch.tensor([1, 4, 5, 7]), torch.tensor([0.0, 9, -8, 0, 9, 9, 0, 9])
    values = torch.tensor([-5.0, 0.1, 3.0, -0.2])
    assert renew_support(indices, values, score, 0.5).tolist() == [1, 4, 5, 7]
    score[4] = score[7] = -1
    grown = set(renew_support(indices, values, score, 0.5).tolist()) - {1, 5}
    assert len(grown) == 2
    assert grown <= {0, 3, 6}


def test_dropped_entries_come_back_where_the_score_asks_for_them():
    indices, values = torch.tensor([2, 3, 6]), torch.tensor([0.1, 0.2, 5.0])
    score = torch.tensor([1.0, 0, 8, 2, 0, 0, 99, 0])
    assert renew_support(indices, values, score, 0.7).tolist() == [2, 3, 6]
    score[0] = 3
    assert renew_support(indices, values, score, 0.7).tolist() == [2, 0, 6]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_renewal_on_ties_is_a_support(fraction):
    """Values of zero, as they are before training, and scores that are all the same."""
    indices = random_support(60, 20)
    renewed = renew_support(indices, torch.zeros(20), torch.zeros(6, 10), fraction)
    assert renewed.shape == (20,)
    assert renewed.unique().numel() == 20
    assert renewed.min() >= 0
    assert renewed.max() < 60
    assert len(set(indices.tolist()) & set(renewed.tolist())) >= 20 - int(fraction * 20)
    assert torch.equal(renew_support(indices, torch.zeros(20), torch.zeros(6, 10), fraction), renewed)


def test_full_core_has_nowhere_to_grow():
    values, score = random_renewal(12, 12)[1:]
    assert renew_support(torch.arange(12), values, score, 0.3).tolist() == list(range(12))


@pytest.mark.parametrize("k", [1, 3, 5, 12, 100])
def test_keep_largest(k):
    gradient = torch.randn(12, dtype=torch.float64)
    largest = sorted(range(12), key=lambda i: -abs(gradient[i].item()))[:k]
    expected = torch.zeros_like(gradient)
    expected[largest] = gradient[largest]
    assert torch.equal(keep_largest(gradient, k), expected)
    assert gradient.min() < 0 < gradient.max(), "magnitudes and signed values must differ for this to say anything"
