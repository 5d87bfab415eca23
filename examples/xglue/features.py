"""The rows that a task's runs train on and are scored on."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from .encoder import load_tokenizer
from .evaluation_set import EvaluationSet, Features
from .files import read_examples
from .kinds import KINDS
from .tasks import TASKS, Split

ENGLISH_DEV = "english dev"  # by which an epoch may be chosen; no other language's dev set is looked at


@lru_cache(maxsize=1)
def load_features(
    model: str,
    data: str,
    task_name: str,
    split: Split,
    languages: tuple[str, ...],
    max_length: int,
    max_rows: int | None,
) -> tuple[Features, dict[str, EvaluationSet]]:
    """Training rows, and evaluation sets by language and `ENGLISH_DEV`; runs that differ in other things share them.

    Raises:
        InputError: If a file cannot be used.
    """
    task, tokenizer = TASKS[task_name], load_tokenizer(model)
    kind = KINDS[task.kind]

    def examples(part: Split, language: str) -> list[Any]:
        return read_examples(Path(data), task, part, language, max_rows)

    def evaluation_set(part: Split, language: str) -> EvaluationSet:
        return kind.evaluation_set(tokenizer, task, examples(part, language), language, max_length)

    sets = {language: evaluation_set(split, language) for language in languages}
    sets[ENGLISH_DEV] = evaluation_set("dev", "en")
    return kind.training_features(tokenizer, task, examples("train", "en"), max_length), sets
