"""Scores, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.metrics import accuracy, correlations, matthews_correlation


def test_accuracy():
    assert accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75


def test_matthews_correlation():
    # TP 2, TN 1, FP 1, FN 1: (2·1 − 1·1) / √(3·3·2·2)
    assert matthews_correlation([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(1 / 6)
    assert matthews_correlation([1, 1, 1], [1, 0, 1]) == 0


def test_correlations():
    predicted, true = np.array([1.0, 2.0, 3.0, 10.0]), np.array([0.0, 1.0, 2.0, 3.0])
    x, y = predicted - 4, true - 1.5
    pearson, spearman = correlations(predicted, true)
    assert pearson == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)))
    assert spearman == pytest.approx(1.0)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_has_no_correlation(number):
    true = np.array([0.0, 1.0, 2.0])
    assert correlations(np.full(3, 0.1), true) == correlations(true, np.ones(3)) == (0.0, 0.0)
    assert np.isnan(correlations(np.array([1.0, number, 2.0]), true)).all()
