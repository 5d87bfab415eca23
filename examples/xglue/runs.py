"""Runs, and the file of their results, which has a line for each finished one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments.methods import METHODS

from .._runs import Record, folder_name, read_runs
from .tasks import TASKS, Split

FINE_TUNING = "graddrop-off"  # plain fine-tuning of what GradDrop trains


@dataclass(frozen=True)
class Run:
    """Everything that decides what a run does; two equal runs are the same run.

    Attributes:
        model: Folder or hub id of the encoder, as it was given.
        data: Folder of the benchmark, as it was given.
        task: Name in `TASKS`.
        method: Name in `METHODS`.
        seed: Of the head, the order of the data and the method.
        split: What is scored after each epoch, "test" or "dev".
        languages: Those that are scored.
        epochs: Passes over the English training file.
        lr: Peak learning rate.
        batch_size: Rows in a batch.
        max_length: Tokens of a row.
        max_rows: Rows of each file; 0 for all.
        dropout: The rate of all of the model's own dropout.
        density: Share of each adapted weight that trains, for the methods that have one.
        target_modules: Layers to adapt; empty for the method's own choice.
        precision: "float32", or "bf16" for mixed precision.
    """

    model: str
    data: str
    task: str
    method: str
    seed: int
    split: Split
    languages: tuple[str, ...]
    epochs: int
    lr: float
    batch_size: int
    max_length: int
    max_rows: int
    dropout: float
    density: float
    target_modules: tuple[str, ...]
    precision: str

    @property
    def folder(self) -> str:
        """Name of the folder of its checkpoints, which no other run has."""
        return folder_name(self)

    def __str__(self) -> str:
        return f"{self.task} {self.method} seed {self.seed}"


FIELDS = {field.name for field in fields(Run)}


def read_results(path: Path) -> dict[Run, Record]:
    """The finished runs in a file.

    Raises:
        InputError: If the file cannot be read, or a line in it is not a result.
    """
    return read_runs(path, _run_of, "examples.xglue.train")


def _run_of(record: Record) -> Run:
    if not record["epochs"]:
        raise ValueError("it has no scores")
    settings: dict[str, Any] = record["run"]
    if settings.keys() != FIELDS:
        raise ValueError(f"its settings are not {', '.join(sorted(FIELDS))}")
    if settings["task"] not in TASKS or settings["method"] not in METHODS:
        raise ValueError(f"there is no {settings['task']} or no {settings['method']}")
    lists = {name: tuple(settings[name]) for name in ("languages", "target_modules")}
    return Run(**{**settings, **lists})


def finished_runs(path: Path) -> set[Run]:
    """The finished runs in a file that need not exist yet. Raises InputError as `read_results` does."""
    return set(read_results(path)) if path.exists() else set()
