"""GLUE's metrics: arrays in, figures from -1 to 1 out, "score" being the one that a table shows.

Where GLUE names two metrics, all are kept. MRPC and QQP are shown by accuracy, as in most tables of dev scores, and
STS-B by the mean of its two correlations, as on GLUE's leaderboard.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import f1_score

from experiments.metrics import accuracy, correlations, matthews_correlation

Scores = dict[str, float]


def score_accuracy(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Accuracy: logits (rows, classes), labels (rows,)."""
    share = accuracy(logits.argmax(1), labels)
    return {"score": share, "accuracy": share}


def score_accuracy_and_f1(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Accuracy, and F1 of class 1: logits (rows, 2), labels (rows,)."""
    f1 = float(f1_score(labels, logits.argmax(1), zero_division=0))  # pyright: ignore[reportArgumentType]
    return {**score_accuracy(logits, labels), "f1": f1}


def score_matthews(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Matthews correlation, 0 if all predictions are the same: logits (rows, classes), labels (rows,)."""
    matthews = matthews_correlation(logits.argmax(1), labels)
    return {"score": matthews, "matthews": matthews, **_without_score(score_accuracy(logits, labels))}


def score_correlations(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    """Pearson's and Spearman's correlation and their mean: predictions (rows, 1), labels (rows,).

    A model that predicts one number for all rows, or something that is none, has no correlation: 0.
    """
    pearson, spearman = correlations(predictions[:, 0].astype(np.float64), labels)
    if np.isnan(pearson) or np.isnan(spearman):
        return {"score": 0.0, "pearson": 0.0, "spearman": 0.0}
    return {"score": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}


def _without_score(scores: Scores) -> Scores:
    return {name: value for name, value in scores.items() if name != "score"}
