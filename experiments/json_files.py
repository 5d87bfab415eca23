"""JSON files, and JSON Lines files that other programs or people wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peft_sparsegrad.cli.errors import InputError

from .text_files import make_folder, read_text, write_whole

Record = dict[str, Any]
Parsed = TypeVar("Parsed")


def read_records(path: Path) -> list[tuple[str, Record]]:
    """Return the objects of a JSON Lines file, each with where it stands, for a message about it.

    Raises:
        InputError: The file cannot be read, holds nothing, or a line is not a JSON object.
    """
    lines = enumerate(read_text(path).split("\n"), start=1)
    records = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    if not records:
        raise InputError(f"{path} is empty")
    return [(where, _parse(where, line)) for where, line in records]


def parse_records(path: Path, parse: Callable[[Record], Parsed], needs: str) -> list[Parsed]:
    """Return what `parse` makes of each object of a JSON Lines file.

    Raises:
        InputError: As for `read_records`, or the record lacks what `needs` says: `parse` raised a LookupError,
            TypeError or ValueError.
    """
    parsed = []
    for where, record in read_records(path):
        try:
            parsed.append(parse(record))
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"{where}: a record needs {needs}") from error
    return parsed


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all, and make its folder."""
    make_folder(path.parent)
    write_whole(path, json.dumps(content, indent=1).encode())


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None if there is no such file.

    Raises:
        InputError: If the file cannot be read, or is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"cannot read {path}: {error}") from error


def text_field(record: Record, name: str) -> str:
    """Return a field that must be a string.

    Raises:
        KeyError: There is no such field.
        TypeError: It is no string.
    """
    if not isinstance(record[name], str):
        raise TypeError(f"`{name}` is no string")
    return record[name]


def text_list(values: Any) -> list[str]:
    """Return a list that must hold strings, and at least one; raise a TypeError or ValueError otherwise."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("this is no list of strings")
    if not values:
        raise ValueError("the list is empty")
    return values


def _parse(where: str, line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: this is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: this is not a JSON object")
    return record
