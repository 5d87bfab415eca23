"""The three kinds of tasks: which model they need, and how their examples become rows and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from . import classification, question_answering, tagging
from .evaluation_set import EvaluationSet, Features


@dataclass(frozen=True)
class Kind:
    """Everything that tasks of one kind have in common.

    Attributes:
        auto_class: Loads the encoder with the head.
        task_type: PEFT's name of the kind.
        collator: Makes a batch of rows; made from the tokenizer.
        training_features: Called with (tokenizer, task, examples, max_length).
        evaluation_set: Called with (tokenizer, task, examples, language, max_length).
    """

    auto_class: Any
    task_type: str
    collator: Callable[..., Any]
    training_features: Callable[..., Features]
    evaluation_set: Callable[..., EvaluationSet]


KINDS: dict[str, Kind] = {
    "classification": Kind(
        AutoModelForSequenceClassification,
        "SEQ_CLS",
        DataCollatorWithPadding,
        classification.training_features,
        classification.evaluation_set,
    ),
    "tagging": Kind(
        AutoModelForTokenClassification,
        "TOKEN_CLS",
        DataCollatorForTokenClassification,
        tagging.training_features,
        tagging.evaluation_set,
    ),
    "question-answering": Kind(
        AutoModelForQuestionAnswering,
        "QUESTION_ANS",
        DataCollatorWithPadding,
        question_answering.training_features,
        question_answering.evaluation_set,
    ),
}
