"""The runs of the comparison."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from experiments.json_files import Record
from experiments.runs import ConfiguredRun
from experiments.training import count_steps

from .tasks import TASKS


@dataclass(frozen=True)
class Run(ConfiguredRun):
    """Everything that decides what a run does; two equal runs are the same run.

    Attributes:
        density: Share of each target weight that trains, for the methods that have one.
        epochs: Passes over the training rows.
        train_rows: Training rows.
        batch_size: Rows in a batch.
        head_steps: Steps for which the task head alone is trained before the method is attached.
        evals: Evaluations along training, the last one at its end.
        precision: "float32", or "bf16" for mixed precision.
        max_eval_rows: Rows of the dev file that are scored; 0 for all.
    """

    PROGRAM: ClassVar[str] = "this benchmark"

    density: float
    epochs: int
    train_rows: int
    batch_size: int
    head_steps: int = 0
    evals: int = 3
    precision: str = "float32"
    max_eval_rows: int = 0

    @property
    def steps(self) -> int:
        """Optimisation steps."""
        return count_steps(self.train_rows, self.batch_size, self.epochs)

    @property
    def eval_steps(self) -> list[int]:
        """The steps after which there is an evaluation."""
        return [round(self.steps * number / self.evals) for number in range(1, self.evals + 1)]

    @classmethod
    def from_record(cls, record: Record) -> Run:
        run = super().from_record(record)
        if "evaluations" not in record:
            raise ValueError("it lacks evaluations")
        if run.task not in TASKS:
            raise ValueError(f"there is no task {run.task!r}")
        return run

    def __str__(self) -> str:
        return f"{self.task} {self.label} lr {self.lr:g} seed {self.seed}"


FIELDS = [field.name for field in fields(Run)]
VARIED_FIELDS = ("task", "method", "settings", "seed", "lr")
SHARED_FIELDS = [name for name in FIELDS if name not in VARIED_FIELDS]  # what one comparison has in common


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
