"""Questions about long texts: overlapping windows for the model, and the span that its logits choose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .answers import answer_scores
from .evaluation_set import EvaluationSet, Features
from .squad import Question
from .tasks import Task

MAX_ANSWER_TOKENS = 30
FIRST_TOKEN = 0  # what a window without the answer points to


@dataclass(frozen=True)
class Window:
    """A part of a context as the model sees it, after the question.

    Attributes:
        question: Index of the question.
        offsets: For each token its begin and end in the context, in characters; None for tokens of the question and
            special ones.
    """

    question: int
    offsets: list[tuple[int, int] | None]

    def tokens_of(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last token of the characters from `start` to before `end`; None if not all are in the window."""
        inside = [position for position, offset in enumerate(self.offsets) if offset is not None]
        if not inside or start < self.offsets[inside[0]][0] or end > self.offsets[inside[-1]][1]:  # pyright: ignore
            return None
        touched = [p for p in inside if self.offsets[p][0] < end and self.offsets[p][1] > start]  # pyright: ignore
        return (touched[0], touched[-1]) if touched else None


@dataclass
class QuestionSet:
    """Scored by the overlap of words with the right answers."""

    features: Features
    windows: list[Window]
    questions: Sequence[Question]
    language: str

    def score(self, predictions: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """Of the logits of first and last token, each of shape (windows, tokens)."""
        answers = [question.answers for question in self.questions]
        return answer_scores(self.predicted_answers(*predictions), answers, self.language)

    def predicted_answers(self, starts: np.ndarray, ends: np.ndarray) -> list[str]:
        """The text of the best span of each question, over all of its windows."""
        spans: dict[int, list[tuple[float, int, int]]] = defaultdict(list)
        for window, start, end in zip(self.windows, starts, ends, strict=True):
            if (span := best_span(start, end, window.offsets)) is not None:
                spans[window.question].append(span)
        return [self._text(number, spans[number]) for number in range(len(self.questions))]

    def _text(self, number: int, spans: list[tuple[float, int, int]]) -> str:
        if not spans:
            return ""
        _, start, end = max(spans)
        return self.questions[number].context[start:end].strip()


def best_span(
    starts: np.ndarray, ends: np.ndarray, offsets: Sequence[tuple[int, int] | None]
) -> tuple[float, int, int] | None:
    """The span of at most `MAX_ANSWER_TOKENS` context tokens whose two logits have the largest sum.

    Args:
        starts, ends: Logits of a window's tokens as first and as last one of the answer: (tokens,). Those after the
            window's own are padding.

    Returns:
        The sum, and begin and end of the span in the context, in characters; None for a window without context.
    """
    inside = np.array([position for position, offset in enumerate(offsets) if offset is not None], dtype=int)
    if not len(inside):
        return None
    sums = starts[inside, None] + ends[None, inside]
    length = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
    sums = np.where((length >= 0) & (length < MAX_ANSWER_TOKENS), sums, -np.inf)
    first, last = np.unravel_index(sums.argmax(), sums.shape)
    begin, end = offsets[inside[first]], offsets[inside[last]]
    assert begin is not None
    assert end is not None
    return float(sums[first, last]), begin[0], end[1]


def training_features(
    tokenizer: PreTrainedTokenizerBase, task: Task, questions: Sequence[Question], max_length: int
) -> Features:
    """A row for each window, with the positions of the first answer's first and last token."""
    features, windows = _tokenize(tokenizer, questions, max_length)
    for row, window in zip(features, windows, strict=True):
        question = questions[window.question]
        span = window.tokens_of(question.start, question.start + len(question.answers[0]))
        row["start_positions"], row["end_positions"] = span or (FIRST_TOKEN, FIRST_TOKEN)
    return features


def evaluation_set(
    tokenizer: PreTrainedTokenizerBase, task: Task, questions: Sequence[Question], language: str, max_length: int
) -> EvaluationSet:
    return QuestionSet(*_tokenize(tokenizer, questions, max_length), questions, language)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], max_length: int
) -> tuple[Features, list[Window]]:
    encoding: Any = tokenizer(
        [_shortened(tokenizer, question.question, max_length // 4) for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=max_length // 3,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    questions_of, offsets = encoding.pop("overflow_to_sample_mapping"), encoding.pop("offset_mapping")
    rows = [dict(zip(encoding, values, strict=True)) for values in zip(*encoding.values(), strict=True)]
    windows = [
        Window(question, _of_context(offsets[row], encoding.sequence_ids(row)))
        for row, question in enumerate(questions_of)
    ]
    return rows, windows


def _of_context(offsets: list[tuple[int, int]], texts: list[int | None]) -> list[tuple[int, int] | None]:
    """The offsets of the tokens of the second text."""
    return [offset if text == 1 else None for offset, text in zip(offsets, texts, strict=True)]


def _shortened(tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> str:
    """The beginning of a question that is too long to leave room for the context."""
    offsets: Any = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return question if len(offsets) <= tokens else question[: offsets[tokens - 1][1]]
