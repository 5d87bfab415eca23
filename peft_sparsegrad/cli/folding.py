"""Tables of a deep model's layers with one line for those that correspond to each other in its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..common.targets.modules import role_of

Row = Sequence[Any]


def folded(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Return a row for each role, in the order of the first layer of each.

    The first cell of a row is a layer's name, and of a result the role with the number of its layers. A column in
    which these differ becomes the range of its numbers.
    """
    roles: dict[str, list[Row]] = {}
    for row in rows:
        roles.setdefault(role_of(str(row[0])), []).append(row)
    return [tuple(members[0]) if len(members) == 1 else _fold(role, members) for role, members in roles.items()]


def _fold(role: str, rows: list[Row]) -> tuple[Any, ...]:
    columns = zip(*rows, strict=True)
    next(columns)
    return f"{role} ({len(rows)})", *map(_range, columns)


def _range(cells: Sequence[Any]) -> Any:
    """Return what cells have in common, or the least and the greatest of them; None if one is no number."""
    if len(set(cells)) == 1:
        return cells[0]
    numbers = {cell: _number(cell) for cell in cells}
    if None in numbers.values():
        return None
    ordered = sorted(numbers, key=lambda cell: numbers[cell] or 0.0)
    return f"{ordered[0]} to {ordered[-1]}"


def _number(cell: Any) -> float | None:
    try:
        return float(str(cell).replace(",", "").removesuffix("%"))
    except ValueError:
        return None
