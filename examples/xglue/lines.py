"""Lines of a text file."""

from __future__ import annotations

from pathlib import Path

from .._common import InputError


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without their ends.

    Not `str.splitlines`, which also splits at characters that are part of a text, such as U+2028.

    Raises:
        InputError: If the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [line.removesuffix("\r") for line in file.read().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
