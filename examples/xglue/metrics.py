"""Scores of labels and rankings, as XGLUE's own evaluation defines them, in percent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
from sklearn.metrics import ndcg_score

from experiments import metrics


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> dict[str, float]:
    """Share of the labels that are right."""
    return {"accuracy": 100 * metrics.accuracy(predicted, true)}


def ndcg(predicted: Sequence[int], true: Sequence[int], queries: Sequence[str]) -> dict[str, float]:
    """Normalised discounted cumulative gain, mean over the queries.

    A query's pages are ranked by their predicted rating, ties count as the mean of their orders, and the gain of a
    page is its true rating. Consecutive rows with the same query belong together; a query with one page, whose
    ranking cannot be wrong, is left out.
    """
    scores = []
    for rows in query_groups(queries):
        if len(rows) > 1:
            gains, ratings = np.asarray(true)[rows], np.asarray(predicted)[rows]
            scores.append(ndcg_score([gains], [ratings]))
    return {"ndcg": 100 * float(np.mean(scores))}


def query_groups(queries: Sequence[str]) -> list[list[int]]:
    """Indices of the rows of each query: consecutive ones that have it."""
    rows = groupby(range(len(queries)), key=lambda row: queries[row])
    return [list(group) for _, group in rows]


def word_accuracy(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of the words whose label is right, over all sentences."""
    return {"accuracy": 100 * metrics.accuracy(list(chain(*predicted)), list(chain(*true)))}


def entity_f1(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of the named entities: one is right if its type and all of its words are."""
    from seqeval.metrics import f1_score, precision_score, recall_score  # which the other tasks can do without

    scores: dict[str, Any] = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {name: 100 * float(score(true, predicted, zero_division=0)) for name, score in scores.items()}
