"""The runs of `examples.glue.train` and of the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.json_files import Record
from experiments.runs import ConfiguredRun

from .tasks import TASKS


@dataclass(frozen=True)
class Run(ConfiguredRun):
    """Everything that decides what a run does: two equal runs are the same run.

    Attributes:
        data: Folder above the tasks' folders, as it was given; None for the hub.
        adapter_lr: That of the method's own values, where it is another.
        batch_size: Rows in a batch.
        weight_decay: Of the model's own weights that train.
        lr_warmup: Share of the steps in which the learning rate rises; after them it falls to 0 on a line.
        density: Trained share of each target weight.
        num_values: Trained values of each target weight, in place of the density.
        rest: Whether the model outside the target weights is "trained" or "frozen". The head always trains.
        target_modules: Names of the target layers; None for the MLP's.
        epochs: Most passes over the training rows.
        patience: Epochs without a better score after which training ends.
        train_rows: Training rows, drawn at random; None for all.
        dev_rows: Rows that are scored, drawn at random but the same for all seeds; None for all.
        max_length: Tokens that are kept of a row.
        warmup_steps: Batches of SparseGrad's and MeProp's warm-up.
        head_steps: Steps before that warm-up which train everything but the method's values.
        precision: "float32", or "bf16" for mixed precision.
    """

    PROGRAM: ClassVar[str] = "examples.glue.train"

    data: str | None
    adapter_lr: float | None
    batch_size: int
    weight_decay: float
    lr_warmup: float
    density: float
    num_values: int | None
    rest: str
    target_modules: tuple[str, ...] | None
    epochs: int
    patience: int
    train_rows: int | None
    dev_rows: int | None
    max_length: int
    warmup_steps: int
    head_steps: int
    precision: str

    @property
    def capacity(self) -> str:
        """Trained part of each target weight, in words."""
        return f"{self.density:.3g} of the entries" if self.num_values is None else f"{self.num_values:,} values"

    def __str__(self) -> str:
        rates = f"lr {self.lr:.3g}" + ("" if self.adapter_lr is None else f", adapter lr {self.adapter_lr:.3g}")
        return f"{self.task}, {self.label}, {self.capacity}, {rates}, batch size {self.batch_size}, seed {self.seed}"

    @classmethod
    def from_record(cls, record: Record) -> Run:
        if not record.keys() >= {"score", "trainable"}:
            raise ValueError("it has no score")
        run = super().from_record(record)
        if run.task not in TASKS:
            raise ValueError(f"there is no task {run.task!r}")
        return run
