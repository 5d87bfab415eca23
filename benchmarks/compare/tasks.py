"""The tasks: where their files are, what a row is, how predictions are scored."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .errors import InputError


class Example(NamedTuple):
    """One or two sentences and their label."""

    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class Task:
    """A task in local files.

    Attributes:
        name: Key in the table.
        metric: What `score` calls "metric", in words.
        file: Path of a file inside the data folder, with `{}` for `train` or `dev`.
        dialect: Settings of `csv.reader` for that file.
        parse: Makes an example of a row; raises ValueError if it cannot.
        num_labels: Outputs of the task head.
        problem_type: What transformers calls the task's loss.
        score: Called with predictions (rows, num_labels) and labels (rows,), both arrays; returns at least "metric"
            and "loss", the mean over the rows.
    """

    name: str
    metric: str
    file: str
    dialect: dict[str, Any]
    parse: Callable[[list[str]], Example]
    num_labels: int
    problem_type: str
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]]

    def load(self, data: Path, split: Literal["train", "dev"]) -> list[Example]:
        """All examples of one file under `data`. Raises InputError if it cannot be read, or a row of it."""
        path = data / self.file.format(split)
        examples: list[Example] = []
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.reader(file, **self.dialect):
                    examples.append(self.parse(row))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; --data is the folder above it") from error
        except (ValueError, KeyError, csv.Error) as error:
            where = f"{path}, row {len(examples) + 1}"
            raise InputError(f"{where} is not in the format of {self.name}: {error}") from error
        if not examples:
            raise InputError(f"{path} is empty")
        return examples

    def sample(self, data: Path, rows: int, seed: int) -> list[Example]:
        """`rows` examples of the training file, without repetition. Raises InputError if it has not as many."""
        examples = self.load(data, "train")
        if rows > len(examples):
            raise InputError(f"{self.name} has {len(examples)} training rows, and --train-rows asks for {rows}")
        return random.Random(seed).sample(examples, rows)


def score_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Matthews correlation and cross entropy of two classes: logits (rows, 2), labels (rows,) of 0 and 1."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    losses = log_sums - shifted[np.arange(len(labels)), labels]
    # The Matthews correlation is Pearson's where both sides are 0 or 1.
    return {"metric": pearson(logits.argmax(axis=1), labels), "loss": float(losses.mean())}


def score_numbers(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean of Pearson's and Spearman's correlation, both of them, squared error: (rows, 1) and (rows,)."""
    predicted, true = predictions[:, 0].astype(np.float64), labels.astype(np.float64)
    values, ranks = pearson(predicted, true), pearson(mean_ranks(predicted), mean_ranks(true))
    loss = float(np.square(predicted - true).mean())
    return {"metric": (values + ranks) / 2, "loss": loss, "pearson": values, "spearman": ranks}


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two arrays (rows,), 0 where one of them is constant and NaN where one holds NaN."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def mean_ranks(x: np.ndarray) -> np.ndarray:
    """Rank of each entry of (rows,), from 1; equal entries share the mean of theirs."""
    if np.isnan(x).any():
        return np.full(x.shape, np.nan)
    _, position, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[position]


def _parse_cola(row: list[str]) -> Example:
    _source, label, _star, sentence = row
    return Example((sentence,), {"0": 0, "1": 1}[label])


def _parse_stsb(row: list[str]) -> Example:
    first, second, score = row
    return Example((first, second), float(score))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            metric="Matthews correlation",
            file="cola/cola_{}.tsv",
            dialect={"delimiter": "\t", "quoting": csv.QUOTE_NONE},
            parse=_parse_cola,
            num_labels=2,
            problem_type="single_label_classification",
            score=score_classes,
        ),
        Task(
            name="stsb",
            metric="mean of Pearson and Spearman correlation",
            file="stsb/stsb_{}.csv",
            dialect={"strict": True},
            parse=_parse_stsb,
            num_labels=1,
            problem_type="regression",
            score=score_numbers,
        ),
    )
}
