"""Batch sizes and learning rates: the SparseGrad paper's best, and the file of those that a search has found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.text_files import write_whole
from peft_sparsegrad.cli.errors import InputError


class Hyperparameters(NamedTuple):
    """Hyperparameters that are searched for."""

    batch_size: int
    lr: float


# Appendix D.
_TABLES: dict[str, dict[str, tuple[int, float]]] = {
    "bert-base": {  # table 13
        "stsb": (32, 1.24e-4),
        "cola": (32, 3.15e-5),
        "mnli": (32, 6.07e-6),
        "mrpc": (32, 1.22e-5),
        "qnli": (16, 1.94e-5),
        "qqp": (32, 1.41e-5),
        "rte": (16, 6.81e-5),
        "sst2": (32, 1.47e-5),
    },
    "roberta-base": {  # table 14
        "stsb": (16, 2.70e-5),
        "cola": (16, 1.01e-5),
        "mnli": (32, 1.51e-5),
        "mrpc": (32, 1.9e-5),
        "qnli": (16, 1.91e-5),
        "qqp": (16, 5.11e-6),
        "rte": (32, 3.05e-5),
        "sst2": (16, 1.33e-5),
    },
    "roberta-large": {  # table 15
        "stsb": (32, 7.71e-5),
        "cola": (16, 1.8e-5),
        "mnli": (16, 1.15e-6),
        "mrpc": (32, 2.47e-5),
        "qnli": (16, 8.83e-6),
        "qqp": (32, 7.2e-6),
        "rte": (32, 1.02e-5),
        "sst2": (32, 1.02e-5),
    },
}
PRESETS: dict[str, dict[str, Hyperparameters]] = {
    model: {task: Hyperparameters(*values) for task, values in table.items()} for model, table in _TABLES.items()
}


def preset_of(model: str) -> str | None:
    """The preset for a folder or hub id: `google-bert/bert-base-uncased` has BERT's, `xlm-roberta-base` has none."""
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return next((preset for preset in PRESETS if name == preset or name.startswith(f"{preset}-")), None)


def read_found(path: Path) -> dict[tuple[str, str], Hyperparameters]:
    """The best values of each (task, method) in a file that `add_found` has written.

    Raises:
        InputError: If it cannot be read, or is something else.
    """
    return {key: Hyperparameters(entry["batch_size"], entry["lr"]) for key, entry in _read_entries(path).items()}


def add_found(path: Path, entry: dict[str, Any]) -> None:
    """Put an entry into the file, which need not exist yet, in place of an older one of that task and method.

    Args:
        entry: "task", "method", "batch_size", "lr", and what else is to be known of them.
    """
    entries = _read_entries(path) if path.exists() else {}
    entries[entry["task"], entry["method"]] = entry
    write_whole(path, json.dumps(list(entries.values()), indent=1).encode() + b"\n")


def _read_entries(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {(entry["task"], entry["method"]): _checked(entry) for entry in entries}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no file of examples.glue.search: {error!r}") from error


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    batch_size, lr = entry["batch_size"], entry["lr"]
    if not (isinstance(batch_size, int) and batch_size > 0 and isinstance(lr, float) and lr > 0):
        raise ValueError(f"batch_size {batch_size!r}, lr {lr!r}")
    return entry
