"""Files of results: a JSON line for each, to which lines are added, and which a killed process leaves usable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_sparsegrad.cli.errors import InputError

from .json_files import Record
from .runs import BaseRun, RunT
from .text_files import make_folder


def read_json_lines(path: Path) -> list[Any]:
    """Return what stands in each line. A last line without its end is that of a killed process, and left out.

    Raises:
        InputError: If the file cannot be read, or a whole line is not JSON.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    return values


def append_json_line(path: Path, value: Any) -> None:
    """Add a line, in place of one that a killed process left half written. On return it is on the disk."""
    line = json.dumps(value).encode() + b"\n"
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_results(path: Path, kind: type[RunT]) -> dict[RunT, Record]:
    """Return the records of a file by the run, of the class `kind`, that each is of.

    Raises:
        InputError: If the file cannot be read, or a line in it is no result of the program that `kind` belongs to.
    """
    results: dict[RunT, Record] = {}
    for number, record in enumerate(read_json_lines(path), start=1):
        try:
            results[kind.from_record(record)] = record
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number} is no result of {kind.PROGRAM}: {error}") from error
    return results


def finished_runs(path: Path, kind: type[RunT]) -> set[RunT]:
    """Return the runs in a file that need not exist yet. Raises InputError as `read_results` does."""
    return set(read_results(path, kind)) if path.exists() else set()


def append_result(path: Path, run: BaseRun, measured: Record) -> None:
    """Add the line of a finished run, and make the file and its folder if they are not there."""
    make_folder(path.parent)
    append_json_line(path, {"run": asdict(run), **measured})
