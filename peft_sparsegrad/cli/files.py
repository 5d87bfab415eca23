"""Outputs that are complete or not there: everything is written beside its place and then moved to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.files.atomic import replacing
from .errors import InputError


def check_file(path: Path, overwrite: bool, suffixes: tuple[str, ...]) -> None:
    """Raise an `InputError` if a file with one of the suffixes must not, or cannot, be written to `path`."""
    if path.suffix not in suffixes:
        raise InputError(f"--out {path} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder, and a file is to be written")
    if path.exists() and not overwrite:
        raise InputError(f"--out {path} is there already: name another file, or give --overwrite")
    _check_writable(path.parent)


def check_folder(path: Path, overwrite: bool) -> None:
    """Raise an `InputError` if files must not, or cannot, be written to the folder `path`."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file, and a folder is to be written")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise InputError(f"--out {path} is not empty: name another folder, or give --overwrite")
    _check_writable(path.parent)


def _check_writable(folder: Path) -> None:
    """Raise unless `folder`, or the nearest one above it that is there, can be written to."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{folder} cannot be written to: {there} is no folder, or is not yours to write to")


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path as `replacing` does, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        yield partial


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write to, whose files are moved to `path` at the end; other files there stay.

    Where `path` is not there yet or is empty, it appears with all its files at once.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists() and not any(path.iterdir()):
            path.rmdir()
        if not path.exists():
            os.rename(partial, path)
            return
        for file in sorted(partial.iterdir()):
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
