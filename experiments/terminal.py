"""The frame of every program: its exit status, and aligned lines on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from peft_sparsegrad.cli.errors import one_line_errors


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Exit with the status that `main` returns, or with 2 and one line for wrong input or a full disk."""
    with one_line_errors():
        sys.exit(main())


def heading(text: str) -> None:
    """Print an underlined line."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def show(label: str, value: str) -> None:
    """Print a value beside its label."""
    print(f"  {label:<26}{value}", flush=True)


def show_lines(text: str) -> None:
    """Print every line of a text, indented."""
    print("\n".join(f"  {line}" for line in text.splitlines()), flush=True)


def show_table(rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print rows of a label and right-aligned columns."""
    for label, cells in rows:
        show(label, "".join(f"{cell:>14}" for cell in cells))
