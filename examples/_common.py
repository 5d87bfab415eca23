"""What the examples share: errors that a user can act on, loading, options and aligned output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from experiments.methods import lora_rank, targeted
from peft_sparsegrad.cli.errors import InputError, one_line_errors
from peft_sparsegrad.common.targeting import in_out_features
from peft_sparsegrad.sparsegrad.plan import check_is_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Exit with `main`'s status, or with 2 and one line where the input is wrong or the disk is full."""
    with one_line_errors():
        sys.exit(main())


def load_pretrained(auto_class: Any, path: str | Path, **settings: Any) -> Any:
    """`auto_class.from_pretrained`, for a path that may be wrong."""
    try:
        return auto_class.from_pretrained(path, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = f"from the folder {path}" if Path(path).is_dir() else f"{path}, which is no folder here, from the hub"
        raise InputError(f"{auto_class.__name__} cannot load {where}: {reason}") from error


def density_of_lora(model: Any, target_modules: list[str] | None, density: float) -> float:
    """The share of the target weights that LoRA, whose ranks are whole numbers, trains where `density` is asked."""
    values, entries = 0, 0
    try:
        for name, module in targeted(model, target_modules):
            check_is_linear(name, module)
            in_features, out_features = in_out_features(module)
            values += lora_rank(in_features, out_features, density) * (in_features + out_features)
            entries += in_features * out_features
    except (TypeError, ValueError) as error:
        raise InputError(f"{str(error).rstrip('.')}; name linear layers with --target-modules") from error
    return values / entries


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def show(label: str, value: str) -> None:
    print(f"  {label:<26}{value}", flush=True)


def show_lines(text: str) -> None:
    print("\n".join(f"  {line}" for line in text.splitlines()), flush=True)


def show_table(rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """A label and right-aligned columns in each row."""
    for label, cells in rows:
        show(label, "".join(f"{cell:>14}" for cell in cells))


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], not {text}")
    return number
