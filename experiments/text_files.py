"""Text files: lines and tables read, whole files written, folders made."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from peft_sparsegrad.cli.errors import InputError, disk_is_full

LONGEST_NAME = 200  # bytes; file systems allow 255, of which the endings of files beside it take some


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


def file_in(folder: str, name: str, ending: str, way_out: str) -> Path:
    """Return `folder/name + ending` for a name that somebody else may have chosen.

    Args:
        folder: Folder of the file.
        name: Name of the file without its ending.
        ending: Ending of the file's name, with its dot.
        way_out: Options that give another name or path, for the error message.

    Raises:
        InputError: If the name is no plain file name, so that the file would be elsewhere, hidden or impossible.
    """
    is_plain = name.isprintable() and not name.startswith(".") and not set(name) & set("/\\")
    if not name.strip() or not is_plain or len((name + ending).encode()) > LONGEST_NAME:
        raise InputError(f"{name[:80]!r} cannot be the name of a file in {folder}: give {way_out}")
    return Path(folder, name + ending)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, its line ends as they are.

    Raises:
        InputError: If the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their ends.

    Not those of `str.splitlines`, which also splits at characters that are part of a text, such as U+2028.

    Raises:
        InputError: As `read_text` does.
    """
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def read_table(path: Path) -> list[tuple[int, list[str]]]:
    """Return the rows of a comma-separated .csv file, or of a tab-separated file of any other name.

    In a tab-separated file quotation marks mean nothing. Empty lines are left out.

    Returns:
        For each row the number of its last line, from 1, and its columns.

    Raises:
        InputError: As `read_text` does, or if the quotation marks of a .csv file do not pair.
    """
    if path.suffix != ".csv":
        return [(number, line.split("\t")) for number, line in enumerate(read_lines(path), start=1) if line]
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"cannot read {path}: {error}") from error
