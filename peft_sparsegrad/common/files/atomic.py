"""Files that are whole or not there: everything is written beside its place and then moved to it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` at the end, and is removed after an error.

    Its name is used by no other process, so that several may write the same file. The last to finish wins.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file at once, as UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")
