"""Runs, and the file of their results: one JSON line per finished run, which survives a killed process."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import InputError

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything that decides what a run does; two equal runs are the same run.

    Attributes:
        model: Folder of the checkpoint, as it was given.
        task: Name in `TASKS`.
        method: Name in `METHODS`.
        seed: Of the training rows and their order, the task head and the method.
        lr: Peak learning rate.
        density: Share of each target weight that trains, for the methods that have one.
        epochs: Passes over the training rows.
        train_rows: Training rows.
        batch_size: Rows in a batch.
    """

    model: str
    task: str
    method: str
    seed: int
    lr: float
    density: float
    epochs: int
    train_rows: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.task} {self.method} lr {self.lr:g} seed {self.seed}"


def product(
    tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], lrs: Sequence[float], **settings: Any
) -> list[Run]:
    """Every combination once, seed by seed: what an interrupted comparison leaves is paired."""
    combinations = itertools.product(seeds, tasks, lrs, methods)
    runs = [Run(task=task, method=method, seed=seed, lr=lr, **settings) for seed, task, lr, method in combinations]
    return list(dict.fromkeys(runs))


def read(path: Path) -> dict[Run, Record]:
    """The finished runs in a file. A last line without its end is that of a killed process, and left out.

    Raises InputError if the file cannot be read or a whole line in it is not a result.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    results: dict[Run, Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            results[Run(**record["run"])] = record
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number} is no result of this benchmark: {error}") from error
    return results


def done(path: Path) -> set[Run]:
    """The finished runs in a file that need not exist yet. Raises InputError as `read` does."""
    return set(read(path)) if path.exists() else set()


def append(path: Path, run: Run, measured: Record) -> None:
    """Add a line to the file, in place of one that a killed process left half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"run": asdict(run), **measured}).encode() + b"\n"
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
