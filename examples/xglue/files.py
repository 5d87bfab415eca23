"""The files of a task, read and checked."""

from __future__ import annotations

from pathlib import Path

from peft_sparsegrad.cli.errors import InputError

from .conll import TaggedSentence, read_tagged_sentences
from .squad import Question, read_questions
from .tasks import Split, Task
from .tsv import TextPair, read_text_pairs

Example = TextPair | TaggedSentence | Question
READERS = {
    "classification": read_text_pairs,
    "tagging": read_tagged_sentences,
    "question-answering": read_questions,
}


def read_examples(data: Path, task: Task, split: Split, language: str, max_rows: int | None = None) -> list[Example]:
    """The examples of a file, at most the first `max_rows`.

    Raises:
        InputError: If the file is not there, has no examples, or one that is malformed.
    """
    path = data / task.file(split, language)
    examples = READERS[task.kind](path, task)
    if not examples:
        raise InputError(f"{path} holds no examples")
    if split == "train":
        _check_answers(path, examples)
    return examples[:max_rows]


def _check_answers(path: Path, examples: list[Example]) -> None:
    """To train on a question, its first answer has to be where the file says."""
    for question in examples:
        if isinstance(question, Question) and not question.answer_is_in_place():
            raise InputError(f"{path}: the first answer of the question {question.id} is not at its `answer_start`")
