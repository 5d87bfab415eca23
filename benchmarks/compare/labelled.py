"""Tasks of labelled sentences: a row is one or two sentences with a class or a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from experiments.text_files import read_table
from peft_sparsegrad.cli.errors import InputError

from .task import Row, Split, Task

MAX_LENGTH = 128  # tokens


class Example(NamedTuple):
    """One or two sentences and their label."""

    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class LabelledTask(Task):
    """A file for training and one for scoring; the model gets a fresh head.

    Attributes:
        file: As in `Task`, with `{}` for `train` or `dev`.
        parse: Makes an example of a row; raises ValueError if it cannot.
        num_labels: Outputs of the task head.
        problem_type: What transformers calls the task's loss.
    """

    parse: Callable[[list[str]], Example]
    num_labels: int
    problem_type: str

    def load_model(self, folder: str) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=self.num_labels,
            problem_type=self.problem_type,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            dtype="float32",
        )

    def rows(self, data: Path, split: Split, tokenizer: Any) -> list[Row]:
        examples = self.load(data, split)
        sides = zip(*(example.texts for example in examples), strict=True)
        columns = tokenizer(*map(list, sides), truncation=True, max_length=MAX_LENGTH)
        columns["labels"] = [example.label for example in examples]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def collator(self, tokenizer: Any) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
        return DataCollatorWithPadding(tokenizer)

    def load(self, data: Path, split: Split) -> list[Example]:
        """All examples of one file under `data`. Raises InputError if it cannot be read, or a row of it."""
        path = data / self.file.format(split)
        try:
            rows = read_table(path)
        except InputError as error:
            raise InputError(f"{error}; --data is the folder above it") from error
        examples: list[Example] = []
        for number, (_line, row) in enumerate(rows, start=1):
            try:
                examples.append(self.parse(row))
            except (ValueError, KeyError) as error:
                raise InputError(f"{path}, row {number} is not in the format of {self.name}: {error}") from error
        if not examples:
            raise InputError(f"{path} is empty")
        return examples


def parse_cola(row: list[str]) -> Example:
    """An example of CoLA's columns: source, label, the author's star, sentence."""
    _source, label, _star, sentence = row
    return Example((sentence,), {"0": 0, "1": 1}[label])


def parse_stsb(row: list[str]) -> Example:
    """An example of STS-B's columns: two sentences and how similar they are."""
    first, second, score = row
    return Example((first, second), float(score))
