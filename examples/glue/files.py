"""A task's rows in local files: .tsv and .csv, with a header or as GLUE's own archive has them, and .jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.json_files import read_records
from experiments.text_files import read_table
from peft_sparsegrad.cli.errors import InputError

from .tasks import Task

STEMS = {"train": ("train",), "dev": ("dev", "validation", "dev_matched", "validation_matched")}
SUFFIXES = (".tsv", ".csv", ".jsonl")
Columns = dict[str, list[Any]]


def find_file(data: Path, task: Task, split: str) -> Path:
    """The file of a split ("train" or "dev") in `data`/TASK.

    The folder has the task's name or that in GLUE's archive (`stsb`, `STS-B`), and the file one of `STEMS`, also with
    the task before it (`stsb_dev.csv`).

    Raises:
        InputError: If there is none, or more than one.
    """
    if not data.is_dir():
        raise InputError(f"{data} is no folder; --data is the folder above the tasks' folders")
    folders = [folder for name in (task.name, task.folder) if (folder := data / name).is_dir()][:1]
    stems = [prefix + stem for stem in STEMS[split] for prefix in ("", f"{task.name}_")]
    found = [path for folder in folders for stem in stems for s in SUFFIXES if (path := folder / (stem + s)).is_file()]
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} are both the {split} file of {task.name}: leave one")
    if not found:
        raise InputError(
            f"there is no {split} file of {task.name}: looked for {data / task.name / split}.tsv and so on"
        )
    return found[0]


def read_columns(path: Path, task: Task) -> Columns:
    """The task's columns of sentences, and "label": a class's position in `task.labels`, or a number.

    Raises:
        InputError: If the file cannot be read or is empty, or for the first row that is not in the task's format.
    """
    columns: Columns = {name: [] for name in (*task.columns, "label")}
    for where, row in read_records(path) if path.suffix == ".jsonl" else _read_delimited(path, task):
        try:
            named = {task.aliases.get(name, name): value for name, value in row.items()}
            parsed = {
                **{name: _parse_sentence(named, name) for name in task.columns},
                "label": _parse_label(named, task),
            }
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        for name, value in parsed.items():
            columns[name].append(value)
    if not columns["label"]:
        raise InputError(f"{path} holds no rows")
    return columns


def _read_delimited(path: Path, task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = read_table(path)
    if not rows:
        return
    header = list(task.headerless)
    if {*task.columns, "label"} <= {task.aliases.get(name, name) for name in rows[0][1]}:
        header = rows.pop(0)[1]
    elif not header:
        raise InputError(f"{path}, line 1 is no header with the columns {', '.join(task.columns)} and label")
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) != len(header):
            raise InputError(f"{where}: {len(row)} columns, not the {len(header)} of {', '.join(header)}")
        yield where, dict(zip(header, row, strict=True))


def _parse_sentence(row: dict[str, Any], column: str) -> str:
    if not isinstance(row.get(column), str):
        raise ValueError(f"there is no text in the column {column}")
    return row[column]


def _parse_label(row: dict[str, Any], task: Task) -> int | float:
    text = str(row.get("label"))
    if task.is_regression:
        number = float(text)
        if not 0 <= number <= 5 or math.isnan(number):
            raise ValueError(f"the label {text} is not between 0 and 5")
        return number
    if text in task.labels:
        return task.labels.index(text)
    if text not in map(str, range(len(task.labels))):
        raise ValueError(f"the label {text!r} is neither of {', '.join(task.labels)} nor its number")
    return int(text)
