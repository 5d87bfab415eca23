"""The runs of `examples.xglue.train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from experiments.json_files import Record
from experiments.methods import METHODS
from experiments.runs import BaseRun

from .tasks import TASKS, Split

Embeddings = Literal["frozen", "trained"]
FINE_TUNING = "graddrop-off"  # plain fine-tuning of what GradDrop trains


@dataclass(frozen=True)
class Run(BaseRun):
    """Everything that decides what a run does; two equal runs are the same run.

    Attributes:
        data: Folder of the benchmark, as it was given.
        split: What is scored after each epoch, "test" or "dev".
        languages: Those that are scored.
        epochs: Passes over the English training file.
        batch_size: Rows in a batch.
        max_length: Tokens of a row.
        max_rows: Rows of each file; 0 for all.
        dropout: The rate of all of the model's own dropout.
        embeddings: "frozen", or "trained": in full, their gradients unmasked.
        blocks_per_epoch: Blocks that GradFreeze adds in an epoch; 0 for an even part of all, and for other methods.
        density: Share of each adapted weight that trains, for the methods that have one.
        target_modules: Layers to adapt; empty for the method's own choice.
        precision: "float32", or "bf16" for mixed precision.
    """

    PROGRAM: ClassVar[str] = "examples.xglue.train"

    data: str
    split: Split
    languages: tuple[str, ...]
    epochs: int
    batch_size: int
    max_length: int
    max_rows: int
    dropout: float
    embeddings: Embeddings
    blocks_per_epoch: int
    density: float
    target_modules: tuple[str, ...]
    precision: str

    def __str__(self) -> str:
        return f"{self.task} {self.method} seed {self.seed}"

    @classmethod
    def from_record(cls, record: Record) -> Run:
        if not record["epochs"]:
            raise ValueError("it has no scores")
        run = super().from_record(record)
        if run.task not in TASKS or run.method not in METHODS:
            raise ValueError(f"there is no {run.task} or no {run.method}")
        return run
