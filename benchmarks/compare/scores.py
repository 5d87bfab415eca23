"""How predictions are scored: numpy arrays in, figures out."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def score_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Matthews correlation and cross entropy of two classes: logits (rows, 2), labels (rows,) of 0 and 1."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    losses = log_sums - shifted[np.arange(len(labels)), labels]
    # The Matthews correlation is Pearson's where both sides are 0 or 1.
    return {"metric": pearson(logits.argmax(axis=1), labels), "loss": float(losses.mean())}


def score_numbers(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean of Pearson's and Spearman's correlation, both of them, squared error: (rows, 1) and (rows,)."""
    predicted, true = predictions[:, 0].astype(np.float64), labels.astype(np.float64)
    values, ranks = pearson(predicted, true), pearson(rankdata(predicted), rankdata(true))
    loss = float(np.square(predicted - true).mean())
    return {"metric": (values + ranks) / 2, "loss": loss, "pearson": values, "spearman": ranks}


def score_tokens(losses: np.ndarray, _labels: np.ndarray) -> dict[str, float]:
    """Perplexity and mean cross entropy: the cross entropies of the tokens, (blocks, tokens)."""
    loss = float(losses.mean(dtype=np.float64))
    return {"metric": float(np.exp(loss)), "loss": loss}


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two arrays (rows,), 0 where one of them is constant and NaN where one holds NaN."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
