import itertools

import pytest

from peft_sparsegrad.functional import SCHEDULES

SEVERAL = [2, 3, 4, 10, 25]


def rates(name: str, p: float, num_epochs: int) -> list[float]:
    return [SCHEDULES[name](p, epoch, num_epochs) for epoch in range(num_epochs)]


@pytest.mark.parametrize(
    ("name", "p", "num_epochs", "expected"),
    [
        ("constant", 0.9, 2, [0.9, 0.9]),
        ("constant", 0.3, 3, [0.3, 0.3, 0.3]),
        ("constant", 0.9, 10, [0.9] * 10),
        ("constant", 0.9, 1, [0.9]),
        ("linear", 0.9, 2, [0.9, 0.0]),
        ("linear", 0.9, 3, [0.9, 0.45, 0.0]),
        ("linear", 0.5, 3, [0.5, 0.25, 0.0]),
        ("linear", 0.9, 10, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        ("linear-paper", 0.9, 1, [0.9]),
        ("linear-paper", 0.9, 2, [0.9, 0.4]),
        ("linear-paper", 0.9, 3, [0.9, 17 / 30, 7 / 30]),
        ("linear-paper", 0.3, 4, [0.3, 0.05, 0.0, 0.0]),
        ("linear-paper", 0.9, 10, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        ("exponential", 0.9, 2, [0.9, 0.009]),
        ("exponential", 0.9, 3, [0.9, 0.09, 0.009]),
        ("exponential", 0.5, 3, [0.5, 0.05, 0.005]),
        ("exponential", 0.9, 10, [0.9 * 10 ** (-2 * epoch / 9) for epoch in range(10)]),
    ],
)
def test_values(name, p, num_epochs, expected):
    assert rates(name, p, num_epochs) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_the_schedules():
    assert list(SCHEDULES) == ["constant", "linear", "linear-paper", "exponential"]


def test_both_linear_schedules_agree_in_the_papers_setting_and_for_no_other_number_of_epochs():
    agree = [
        num_epochs
        for num_epochs in range(2, 21)
        if rates("linear", 0.9, num_epochs) == pytest.approx(rates("linear-paper", 0.9, num_epochs), abs=1e-12)
    ]
    assert agree == [10]


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("num_epochs", SEVERAL)
@pytest.mark.parametrize("p", [0.0, 0.2, 0.9])
def test_starts_at_p_never_rises_and_stays_a_rate(name, num_epochs, p):
    values = rates(name, p, num_epochs)
    assert values[0] == p
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert all(0 <= value <= p for value in values)


@pytest.mark.parametrize("num_epochs", SEVERAL)
@pytest.mark.parametrize("p", [0.2, 0.9, 0.999])
def test_last_epoch(num_epochs, p):
    assert SCHEDULES["constant"](p, num_epochs - 1, num_epochs) == p
    assert SCHEDULES["linear"](p, num_epochs - 1, num_epochs) == 0
    assert SCHEDULES["exponential"](p, num_epochs - 1, num_epochs) == pytest.approx(p / 100, rel=1e-12)


@pytest.mark.parametrize("num_epochs", SEVERAL)
def test_linear_falls_by_the_same_amount_and_exponential_by_the_same_factor(num_epochs):
    linear, exponential = rates("linear", 0.9, num_epochs), rates("exponential", 0.9, num_epochs)
    for epoch in range(num_epochs - 1):
        assert linear[epoch] - linear[epoch + 1] == pytest.approx(0.9 / (num_epochs - 1))
        assert exponential[epoch + 1] / exponential[epoch] == pytest.approx(0.01 ** (1 / (num_epochs - 1)))


@pytest.mark.parametrize("num_epochs", [11, 12, 20])
def test_the_papers_step_reaches_zero_before_the_last_of_many_epochs_and_is_never_negative(num_epochs):
    values = rates("linear-paper", 0.9, num_epochs)
    assert values[-2] <= 1 / num_epochs
    assert values[-1] == 0
    assert min(values) == 0


@pytest.mark.parametrize("num_epochs", [2, 3, 9])
def test_the_papers_step_ends_above_zero_after_few_epochs(num_epochs):
    assert rates("linear-paper", 0.9, num_epochs)[-1] == pytest.approx(1 / num_epochs - 0.1)
