"""The interface of a task: rows to train on and to score, a model, a score."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from peft_sparsegrad.cli.errors import InputError

Row = dict[str, Any]
Split = Literal["train", "dev"]


@dataclass(frozen=True)
class Task(ABC):
    """A task in local files.

    Attributes:
        name: Key in the table.
        metric: What the score calls "metric", in words.
        loss: What the score calls "loss", in words, with its unit.
        file: Path of its data inside the data folder.
        score: Called with predictions and labels, both arrays; returns at least "metric" and "loss", a mean.
        higher_is_better: Whether a greater metric is the better one. A lower loss always is.
        has_head: Whether the model gets a fresh task head.
        unit: What is counted as a row of training data.
    """

    name: str
    metric: str
    loss: str
    file: str
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    higher_is_better: ClassVar[bool] = True
    has_head: ClassVar[bool] = True
    unit: ClassVar[str] = "rows"

    def check_model(self, folder: str) -> None:  # noqa: B027
        """Raises InputError if the checkpoint is of a kind that the task cannot use."""

    @abstractmethod
    def load_model(self, folder: str) -> Any:
        """The model in float32, without dropout (the GradDrop paper trains without)."""

    @abstractmethod
    def rows(self, data: Path, split: Split, tokenizer: Any) -> list[Row]:
        """All rows of a split, as the model takes them but without padding.

        Raises:
            InputError: If the file under `data` cannot be read, or a row of it.
        """

    @abstractmethod
    def collator(self, tokenizer: Any) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
        """Return the function that makes a batch of rows."""

    @staticmethod
    def reduce(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the part of the model's predictions that is kept, batch by batch, until they are scored."""
        return predictions

    def divide(self, data: Path, tokenizer: Any, count: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Shuffle the training rows. Returns the first `count` and the others.

        Raises:
            InputError: If there are not so many, or as `rows` does.
        """
        rows, rng = self.rows(data, "train", tokenizer), random.Random(seed)
        self._check_count("training", count, "train", rows, "; --epochs says how often each is used")
        chosen = rng.sample(range(len(rows)), count)
        others = sorted(set(range(len(rows))).difference(chosen))
        rng.shuffle(others)
        return [rows[i] for i in chosen], [rows[i] for i in others]

    def dev(self, data: Path, tokenizer: Any, count: int) -> list[Row]:
        """`count` rows to score, always the same, or all where it is 0; short ones first, which saves padding.

        Raises:
            InputError: If there are not so many, or as `rows` does.
        """
        rows = self.rows(data, "dev", tokenizer)
        self._check_count("dev", count, "max-eval", rows)
        chosen = random.Random(0).sample(rows, count) if count else rows
        return sorted(chosen, key=lambda row: len(row["input_ids"]))

    def _check_count(self, kind: str, count: int, option: str, rows: list[Row], way_out: str = "") -> None:
        if count > len(rows):
            asked = f"--{option}-rows asks for {count}"
            raise InputError(f"{self.name} has {len(rows)} {kind} {self.unit}, and {asked}{way_out}")
