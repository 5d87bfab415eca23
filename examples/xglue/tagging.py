"""Sentences with a label for each word: tokens for the model, and scores of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .conll import TaggedSentence
from .evaluation_set import EvaluationSet, Features
from .metrics import entity_f1, word_accuracy
from .tasks import Task

IGNORED = -100  # what the cross entropy leaves out
NO_LABEL = "O"  # of a word that the model did not see: no entity, and no part of speech, which is wrong


@dataclass
class TaggedSet:
    """Scored word by word, or entity by entity.

    Attributes:
        positions: For each word of a sentence that has been seen, the position of its first token.
    """

    features: Features
    sentences: Sequence[TaggedSentence]
    positions: list[dict[int, int]]
    task: Task

    def score(self, predictions: np.ndarray) -> dict[str, float]:
        """Of logits of shape (sentences, tokens, labels)."""
        true = [[self.task.labels[label] for label in sentence.labels] for sentence in self.sentences]
        predicted = [
            [self._label(logits, positions.get(word)) for word in range(len(sentence.words))]
            for logits, positions, sentence in zip(predictions, self.positions, self.sentences, strict=True)
        ]
        return entity_f1(predicted, true) if self.task.metric == "f1" else word_accuracy(predicted, true)

    def _label(self, logits: np.ndarray, position: int | None) -> str:
        return NO_LABEL if position is None else self.task.labels[int(logits[position].argmax())]


def training_features(
    tokenizer: PreTrainedTokenizerBase, task: Task, sentences: Sequence[TaggedSentence], max_length: int
) -> Features:
    """A row for each sentence. The first token of a word has the word's label, the others have none."""
    features, positions = _tokenize(tokenizer, sentences, max_length)
    for row, sentence, first_tokens in zip(features, sentences, positions, strict=True):
        row["labels"] = [IGNORED] * len(row["input_ids"])
        for word, position in first_tokens.items():
            row["labels"][position] = sentence.labels[word]
    return features


def evaluation_set(
    tokenizer: PreTrainedTokenizerBase, task: Task, sentences: Sequence[TaggedSentence], language: str, max_length: int
) -> EvaluationSet:
    features, positions = _tokenize(tokenizer, sentences, max_length)
    return TaggedSet(features, sentences, positions, task)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[TaggedSentence], max_length: int
) -> tuple[Features, list[dict[int, int]]]:
    words = [sentence.words for sentence in sentences]
    columns = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows, [first_tokens(columns.word_ids(index)) for index in range(len(rows))]


def first_tokens(word_ids: Sequence[Any]) -> dict[int, int]:
    """The position of the first token of each word.

    Args:
        word_ids: For each token the index of its word, or None for a special token.
    """
    positions: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            positions.setdefault(word, position)
    return positions
