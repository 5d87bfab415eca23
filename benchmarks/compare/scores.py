"""Scores of predictions: numpy arrays in, figures out."""

from __future__ import annotations

import numpy as np

from experiments.metrics import correlations, matthews_correlation


def score_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Matthews correlation and cross entropy of two classes: logits (rows, 2), labels (rows,) of 0 and 1."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    losses = log_sums - shifted[np.arange(len(labels)), labels]
    return {"metric": matthews_correlation(logits.argmax(axis=1), labels), "loss": float(losses.mean())}


def score_numbers(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean of Pearson's and Spearman's correlation, both of them, squared error: (rows, 1) and (rows,)."""
    predicted, true = predictions[:, 0].astype(np.float64), labels.astype(np.float64)
    pearson, spearman = correlations(predicted, true)
    loss = float(np.square(predicted - true).mean())
    return {"metric": (pearson + spearman) / 2, "loss": loss, "pearson": pearson, "spearman": spearman}


def score_tokens(losses: np.ndarray, _labels: np.ndarray) -> dict[str, float]:
    """Perplexity and mean cross entropy: the cross entropies of the tokens, (blocks, tokens)."""
    loss = float(losses.mean(dtype=np.float64))
    return {"metric": float(np.exp(loss)), "loss": loss}
