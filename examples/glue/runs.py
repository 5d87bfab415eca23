"""Runs, and the file of their results: one JSON line for each finished run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from .._runs import Record, folder_name, read_runs


@dataclass(frozen=True)
class Run:
    """Everything that decides what a run does: two equal runs are the same run.

    Attributes:
        model: Folder or hub id of the checkpoint, as it was given.
        data: Folder above the tasks' folders, as it was given; None for the hub.
        task: Name in `TASKS`.
        method: Name in `METHODS`.
        seed: Of the task head, the method and the order of the rows.
        lr: Peak learning rate.
        adapter_lr: That of the method's own values, where it is another.
        batch_size: Rows in a batch.
        density: Trained share of each target weight.
        num_values: Trained values of each target weight, in place of the density.
        rest: Whether the model outside the target weights is "trained" or "frozen". The head always trains.
        target_modules: Names of the target layers; None for the MLP's.
        epochs: Most passes over the training rows.
        patience: Epochs without a better score after which training ends.
        train_rows: Training rows, drawn at random; None for all.
        max_length: Tokens that are kept of a row.
        warmup_steps: Batches of SparseGrad's and MeProp's warm-up.
        head_steps: Steps before that warm-up which train everything but the method's values.
        precision: "float32", or "bf16" for mixed precision.
    """

    model: str
    data: str | None
    task: str
    method: str
    seed: int
    lr: float
    adapter_lr: float | None
    batch_size: int
    density: float
    num_values: int | None
    rest: str
    target_modules: tuple[str, ...] | None
    epochs: int
    patience: int
    train_rows: int | None
    max_length: int
    warmup_steps: int
    head_steps: int
    precision: str

    @property
    def folder_name(self) -> str:
        """A name of its own for the run's folder, short and the same in every process."""
        return folder_name(self)

    @property
    def capacity(self) -> str:
        """What of each target weight trains, in words."""
        return f"{self.density:.3g} of the entries" if self.num_values is None else f"{self.num_values:,} values"

    def __str__(self) -> str:
        rates = f"lr {self.lr:.3g}" + ("" if self.adapter_lr is None else f", adapter lr {self.adapter_lr:.3g}")
        return f"{self.task}, {self.method}, {self.capacity}, {rates}, batch size {self.batch_size}, seed {self.seed}"


FIELDS = {field.name for field in fields(Run)}


def read_results(path: Path) -> dict[Run, Record]:
    """The finished runs in a file.

    Raises:
        InputError: If the file cannot be read, or a line in it is not a result.
    """
    return read_runs(path, _run_of, "examples.glue.train")


def _run_of(record: Record) -> Run:
    settings = record["run"]
    if settings.keys() != FIELDS or not record.keys() >= {"score", "trainable"}:
        raise ValueError("it has other fields")
    targets = settings["target_modules"]
    return Run(**{**settings, "target_modules": None if targets is None else tuple(targets)})


def finished_runs(path: Path) -> set[Run]:
    """The runs in a file that need not exist yet. Raises InputError as `read_results` does."""
    return set(read_results(path)) if path.exists() else set()
