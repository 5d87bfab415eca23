"""Scores of predictions, from scikit-learn and scipy: figures from -1 to 1."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef


def accuracy(predicted: ArrayLike, true: ArrayLike) -> float:
    """Return the share of the labels that are right: two sequences (rows,)."""
    return float(accuracy_score(true, predicted))


def matthews_correlation(predicted: ArrayLike, true: ArrayLike) -> float:
    """Return the Matthews correlation of any number of classes, 0 where one of the two sides (rows,) is constant."""
    return float(matthews_corrcoef(true, predicted))


def correlations(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Return Pearson's and Spearman's correlation of two arrays (rows,).

    Both are 0 where one of the arrays is constant, and NaN where one holds something that is no number.
    """
    if not (np.isfinite(predicted).all() and np.isfinite(true).all()):
        return math.nan, math.nan
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0, 0.0
    pearson: float = pearsonr(predicted, true).statistic  # pyright: ignore[reportAttributeAccessIssue]
    spearman: float = spearmanr(predicted, true).statistic  # pyright: ignore[reportAttributeAccessIssue]
    return float(pearson), float(spearman)
