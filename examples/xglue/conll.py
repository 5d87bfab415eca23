"""Sentences with a label for each word: NER and POS, as `word label` lines or in the CoNLL-U format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from experiments.text_files import read_lines
from peft_sparsegrad.cli.errors import InputError

from .tasks import Task

CONLLU_COLUMNS = 10
FORM, UPOS = 1, 3
Line = tuple[int, str]


@dataclass(frozen=True)
class TaggedSentence:
    """Words, and for each the index of its label in the task's labels."""

    words: list[str]
    labels: list[int]


def read_tagged_sentences(path: Path, task: Task) -> list[TaggedSentence]:
    """The sentences of a file, which are separated by blank lines.

    A line is a word and its label, with a space or a tab between them, or it has the ten tab-separated columns of
    CoNLL-U (Universal Dependencies), of which FORM and UPOS are read.

    Raises:
        InputError: If the file cannot be read, or a line has other columns or an unknown label.
    """
    lines = list(enumerate(read_lines(path), start=1))
    words = _conllu_words if any(line.count("\t") == CONLLU_COLUMNS - 1 for _, line in lines) else _words
    sentences = []
    for is_blank, group in groupby(lines, key=lambda line: not line[1].strip()):
        tagged = [] if is_blank else list(words(group, path))
        if tagged:
            labels = [_index(label, task, f"{path}, line {number}") for number, _, label in tagged]
            sentences.append(TaggedSentence([word for _, word, _ in tagged], labels))
    return sentences


def _words(lines: Iterator[Line], path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, word and label of each line, but for the marks between documents."""
    for number, line in lines:
        if line.startswith("-DOCSTART-"):
            continue
        columns = line.strip().replace("\t", " ").split(" ")
        if len(columns) != 2:
            raise InputError(f"{path}, line {number}: {len(columns)} columns in place of 2, a word and its label")
        yield number, columns[0], columns[1]


def _conllu_words(lines: Iterator[Line], path: Path) -> Iterator[tuple[int, str, str]]:
    """The same for CoNLL-U, without comments, multiword tokens (`3-4`) and empty nodes (`3.1`)."""
    for number, line in lines:
        if line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != CONLLU_COLUMNS:
            raise InputError(f"{path}, line {number}: {len(columns)} columns in place of the 10 of CoNLL-U")
        if columns[0].isdigit():
            yield number, columns[FORM], columns[UPOS]


def _index(label: str, task: Task, where: str) -> int:
    if label not in task.labels:
        raise InputError(f"{where}: {label!r} is no label of {task.name}, which has {', '.join(task.labels)}")
    return task.labels.index(label)
