"""Texts and pairs of texts: tokens for the model, and scores of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from peft_sparsegrad.cli.errors import InputError

from .evaluation_set import EvaluationSet, Features
from .metrics import accuracy, ndcg, query_groups
from .tasks import Task
from .tsv import TextPair


@dataclass
class TextPairSet:
    """Scored by accuracy, or by nDCG where the first text is a query whose pages are ranked."""

    features: Features
    pairs: Sequence[TextPair]
    metric: str

    def score(self, predictions: np.ndarray) -> dict[str, float]:
        """Of logits of shape (pairs, labels)."""
        predicted, true = predictions.argmax(axis=1).tolist(), [pair.label for pair in self.pairs]
        if self.metric == "ndcg":
            return ndcg(predicted, true, [pair.first for pair in self.pairs])
        return accuracy(predicted, true)


def training_features(
    tokenizer: PreTrainedTokenizerBase, task: Task, pairs: Sequence[TextPair], max_length: int
) -> Features:
    """A row for each pair; of the longer text the end is cut off."""
    features = _tokenize(tokenizer, pairs, max_length)
    return [{**row, "labels": pair.label} for row, pair in zip(features, pairs, strict=True)]


def evaluation_set(
    tokenizer: PreTrainedTokenizerBase, task: Task, pairs: Sequence[TextPair], language: str, max_length: int
) -> EvaluationSet:
    if task.metric == "ndcg" and all(len(rows) == 1 for rows in query_groups([pair.first for pair in pairs])):
        raise InputError(f"{task.name} in {language}: no query has two pages in succession, so there is no nDCG")
    return TextPairSet(_tokenize(tokenizer, pairs, max_length), pairs, task.metric)


def _tokenize(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[TextPair], max_length: int) -> Features:
    seconds = None if pairs[0].second is None else [pair.second or "" for pair in pairs]
    columns = tokenizer([pair.first for pair in pairs], seconds, truncation=True, max_length=max_length)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
