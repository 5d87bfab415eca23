"""Files of finished runs, a JSON line each, and the folders of runs in progress."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ._common import InputError
from ._files import append_json_line, read_json_lines

Record = dict[str, Any]
RunT = TypeVar("RunT")


def folder_name(run: Any) -> str:
    """A name of its own for a run's folder, short and the same in every process.

    Args:
        run: A dataclass of everything that decides what the run does, with `task`, `method` and `seed` among it.
    """
    settings = json.dumps(asdict(run), sort_keys=True).encode()
    return f"{run.task}-{run.method}-{run.seed}-{hashlib.sha256(settings).hexdigest()[:12]}"


def read_runs(path: Path, run_of: Callable[[Record], RunT], program: str) -> dict[RunT, Record]:
    """The finished runs in a file, by what `run_of` makes of a record.

    Raises:
        InputError: If the file cannot be read, or a line in it is no result of `program`: `run_of` raised a KeyError,
            TypeError or ValueError.
    """
    results: dict[RunT, Record] = {}
    for number, record in enumerate(read_json_lines(path), start=1):
        try:
            results[run_of(record)] = record
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number} is no result of {program}: {error}") from error
    return results


def append_run(path: Path, run: Any, result: Record) -> None:
    append_json_line(path, {"run": asdict(run), **result})
