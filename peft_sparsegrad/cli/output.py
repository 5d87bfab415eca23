"""Output of the commands: JSON for programs, tables for people."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from .folding import folded

MOST_LAYERS = 16  # that are listed one by one
_WIDTH = 160  # of what is not printed to a terminal, where nothing is to be cut off


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Inside, the loggers `names` report errors alone."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def new_console() -> Console:
    """A console for tables on the standard output."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, soft_wrap=True)


def print_json(result: Any) -> None:
    """Print a dataclass or a dictionary as JSON. Numbers that JSON lacks, NaN and infinity, become null."""
    entries = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result  # pyright: ignore
    print(json.dumps(_finite(entries), indent=2, default=str))


def _finite(entries: Any) -> Any:
    if isinstance(entries, dict):
        return {str(key): _finite(value) for key, value in entries.items()}
    if isinstance(entries, (list, tuple, set)):
        return [_finite(value) for value in entries]
    return None if isinstance(entries, float) and not math.isfinite(entries) else entries


def print_facts(console: Console, facts: Iterable[tuple[str, Any]]) -> None:
    """Labels and values below each other; what is None is left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in facts:
        if value is not None:
            table.add_row(f"[bold]{label}", _escaped(value))
    console.print(table)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table whose first column holds names and whose others hold numbers; None is shown as a dash."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*("-" if cell is None else _escaped(cell) for cell in row))
    console.print()
    console.print(table)


def print_layers(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], every: bool
) -> None:
    """A table of layers, by role if there are many and not `every` one is asked for."""
    if not every and len(rows) > MOST_LAYERS:
        title, rows = f"{title} (by role; --all for each)", folded(rows)
    print_table(console, title, columns, rows)


def _escaped(value: Any) -> str:
    return str(value).replace("[", r"\[")


def percent(share: float | None, digits: int = 1) -> str | None:
    """A share as a percentage."""
    return None if share is None else f"{share:.{digits}%}"


def shape(sizes: Sequence[int] | None) -> str | None:
    """Sizes as `64 x 32`."""
    return None if sizes is None else " x ".join(map(str, sizes))
