"""Tab-separated texts and pairs of texts with a label: XNLI, NC, PAWS-X, QAM, QADSM, WPR and SIB-200."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.text_files import read_table
from peft_sparsegrad.cli.errors import InputError

from .tasks import Task


@dataclass(frozen=True)
class TextPair:
    """A text or two, and the index of their label in the task's labels. A third text is part of the second."""

    first: str
    second: str | None
    label: int


def read_text_pairs(path: Path, task: Task) -> list[TextPair]:
    """The rows of a file, which has a header line if its name ends in `.tsv`.

    Raises:
        InputError: If the file cannot be read, or a row has other columns than the task's or an unknown label.
    """
    rows = read_table(path)
    if path.suffix == ".tsv" and rows:
        number, header = rows.pop(0)
        if any(cell.strip() in task.labels for cell in header):
            raise InputError(f"{path}, line {number}: a header is needed here, and this is a row")
    return [_text_pair(row, task, f"{path}, line {number}") for number, row in rows]


def _text_pair(row: list[str], task: Task, where: str) -> TextPair:
    if len(row) != len(task.columns):
        raise InputError(
            f"{where}: {len(row)} columns in place of {len(task.columns)}, which are {', '.join(task.columns)}"
        )
    values = dict(zip(task.columns, row, strict=True))
    label = values.pop("label").strip()
    label = task.aliases.get(label, label)
    if label not in task.labels:
        raise InputError(f"{where}: {label!r} is no label of {task.name}, which has {', '.join(task.labels)}")
    first, *others = [value for column, value in values.items() if column != "id"]
    return TextPair(first, " ".join(others) if others else None, task.labels.index(label))
