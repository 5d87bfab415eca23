"""Files that a killed process leaves usable: whole ones, and JSON lines to which results are added."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft_sparsegrad.cli.errors import InputError, disk_is_full


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if they are not there.

    Raises:
        InputError: If that cannot be done, for want of permission for instance; a full disk is an OSError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_is_full(error):
            raise
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def read_json_lines(path: Path) -> list[Any]:
    """What stands in each line. A last line without its end is that of a killed process, and left out.

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
