"""The settings that a run was started with: the same command goes on with it, and another one does not mix with it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.json_files import Record, read_json, write_json
from experiments.results import read_json_lines
from peft_sparsegrad.cli.errors import InputError

# These change where or how loudly something is done, not what comes out of it.
WITHOUT_EFFECT = {"out", "overwrite", "report_to", "yes", "dry_run", "max_retries", "api_key_env"}


def settings_of(args: argparse.Namespace, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a result depends on, and `facts` that it depends on too, by a name that begins with "the "."""
    options = {name: value for name, value in vars(args).items() if name not in WITHOUT_EFFECT}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return json.loads(json.dumps({**plain, **facts}))  # as a file has them: lists in place of tuples


def check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise an InputError that names the first setting in which two runs differ."""
    for name in [*now, *(name for name in earlier if name not in now)]:
        if earlier.get(name) != now.get(name):
            what = name if name.startswith("the ") else f"--{name.replace('_', '-')}"
            raise InputError(
                f"{where} was begun with {what} {earlier.get(name)} and now it is {now.get(name)}: "
                "give the same, another --out, or --overwrite to start anew"
            )


def earlier_records(path: Path, settings: Mapping[str, Any], overwrite: bool) -> list[Record]:
    """The records that a run with these settings has written to `path`; none if they are to be overwritten.

    Raises:
        InputError: The file belongs to a run with other settings, or is none of ours.
    """
    earlier = read_json(_beside(path))
    if earlier is None and path.exists():
        raise InputError(f"{path} exists and was not written by this program: give another --out")
    if earlier is None or overwrite:
        return []
    check_same(earlier, settings, path)
    return read_json_lines(path) if path.exists() else []


def begin_records(path: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Make `path` ready for records, after `earlier_records` has agreed, and keep the settings in a file beside it."""
    if overwrite:
        path.unlink(missing_ok=True)
    write_json(_beside(path), settings)


def fingerprint(content: Any) -> str:
    """A short hash of anything that JSON holds."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")
