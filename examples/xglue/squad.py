"""Questions about a text whose answers are spans of it: MLQA, as JSON in the format of SQuAD 1.1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_sparsegrad.cli.errors import InputError

from .tasks import Task


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        answers: The texts of the right answers, one at least.
        start: Where in the context the first of them begins, in characters.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int

    def answer_is_in_place(self) -> bool:
        return self.start >= 0 and self.context.startswith(self.answers[0], self.start)


def read_questions(path: Path, task: Task) -> list[Question]:
    """The questions of a file.

    Raises:
        InputError: If the file cannot be read, or is not in the format.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no {task.name} file: it needs `data` with `paragraphs`") from error
    return [question for number, each in enumerate(paragraphs, start=1) for question in _of(each, path, number)]


def _of(paragraph: Any, path: Path, number: int) -> Iterator[Question]:
    where = f"{path}, paragraph {number}"
    try:
        for qa in paragraph["qas"]:
            where = f"{path}, paragraph {number}, question {qa['id']}"
            answers = qa["answers"]
            texts = tuple(str(answer["text"]) for answer in answers)
            start = int(answers[0]["answer_start"])
            yield Question(str(qa["id"]), str(qa["question"]), str(paragraph["context"]), texts, start)
    except KeyError as error:
        raise InputError(f"{where} lacks {error}") from error
    except IndexError as error:
        raise InputError(f"{where} has no answer") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} is not in the format of SQuAD: {error}") from error
