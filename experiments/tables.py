"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> str:
    """Return a table whose first `labels` columns are aligned left and the others right."""
    marks = [*["---"] * labels, *["---:"] * (len(header) - labels)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *rows))
