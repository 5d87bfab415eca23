"""Runs, and the file of their results: one JSON line per finished run, which survives a killed process."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
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
        settings: What the method's `attach` is given besides, as JSON with sorted keys.
        head_steps: Steps for which the task head alone is trained before the method is attached.
        evals: Evaluations along training, the last one at its end.
        precision: "float32", or "bf16" for mixed precision.
        max_eval_rows: Rows of the dev file that are scored; 0 for all.
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
    settings: str = "{}"
    head_steps: int = 0
    evals: int = 3
    precision: str = "float32"
    max_eval_rows: int = 0

    @property
    def label(self) -> str:
        """The method and its settings, for people: `sparsegrad, rank 192`."""
        return ", ".join([self.method, *(f"{key} {_plain(value)}" for key, value in self.overrides.items())])

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings as keyword arguments."""
        return json.loads(self.settings)

    @property
    def steps(self) -> int:
        """Optimisation steps."""
        return math.ceil(self.train_rows / self.batch_size) * self.epochs

    @property
    def eval_steps(self) -> list[int]:
        """The steps after which there is an evaluation."""
        return [round(self.steps * number / self.evals) for number in range(1, self.evals + 1)]

    def __str__(self) -> str:
        return f"{self.task} {self.label} lr {self.lr:g} seed {self.seed}"


FIELDS = [field.name for field in fields(Run)]
VARIED_FIELDS = ("task", "method", "settings", "seed", "lr")
SHARED_FIELDS = [name for name in FIELDS if name not in VARIED_FIELDS]  # what one comparison has in common


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def product(
    tasks: Sequence[str],
    methods: Sequence[str],
    settings: Sequence[str],
    seeds: Sequence[int],
    lrs: Sequence[float],
    **common: Any,
) -> list[Run]:
    """Every combination once, seed by seed: what an interrupted comparison leaves is paired."""
    runs = [
        Run(task=task, method=method, settings=each, seed=seed, lr=lr, **common)
        for seed, task, lr, method, each in itertools.product(seeds, tasks, lrs, methods, settings)
    ]
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
            results[_run_of(record)] = record
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number} is no result of this benchmark: {error}") from error
    return results


def _run_of(record: Record) -> Run:
    run = Run(**record["run"])
    lacking = [*sorted(set(FIELDS).difference(record["run"])), *({"evaluations"} - record.keys())]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}, as an older version wrote it")
    return run


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
