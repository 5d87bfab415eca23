"""Tables of costs, measured in the runs whose scores the other tables have."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from experiments.tables import markdown_table

from .rows import Cell, Row
from .tasks import TASKS


def speed_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Tables 3 and 7: training steps in a second, by the median step of each run."""
    return _by_task(rows, tasks, lambda cell: _inverse(cell.cost("seconds_per_step")), "{:.2f}")


def memory_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Tables 3 and 8: what is allocated at the worst moment of a training step."""
    return _by_task(rows, tasks, lambda cell: _megabytes(cell.cost("peak_memory")), "{:,.0f}")


def size_table(rows: Sequence[Row]) -> str:
    """The optimizer's state, and the file of what was trained, of the first task."""
    lines = []
    for row in rows:
        cell = next(iter(row.cells.values()))
        sizes = [_megabytes(cell.cost(name)) for name in ("optimizer_bytes", "saved_bytes")]
        lines.append([row.label, *(_shown(size, "{:,.1f}") for size in sizes)])
    return markdown_table(["method", "optimizer state", "saved"], lines)


def _by_task(rows: Sequence[Row], tasks: Sequence[str], of_cell: Callable[[Cell], float | None], form: str) -> str:
    lines = []
    for row in rows:
        values = [of_cell(row.cells[task]) if task in row.cells else None for task in tasks]
        found = [value for value in values if value is not None]
        average = statistics.fmean(found) if len(found) == len(values) else None
        lines.append([row.label, *(_shown(value, form) for value in (average, *values))])
    return markdown_table(["method", "AVG", *(TASKS[task].title for task in tasks)], lines)


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _inverse(seconds: float | None) -> float | None:
    return None if seconds is None else 1 / seconds


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e6
