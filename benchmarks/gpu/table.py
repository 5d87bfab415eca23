"""Markdown tables of the measurements."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.tables import markdown_table

from .settings import BASELINE

TIMES = ("step, median", "/ LoRA's", "quartiles", "least", "/ LoRA's")
HEADER = ("", "trained", *TIMES, "kept", "/ LoRA's", "peak", "/ LoRA's", "file", "warm-up, steps")


def tables(result: dict[str, Any]) -> str:
    """Return where it was measured, and a table for each model and batch, its ratios to those of LoRA r=16."""
    parts = [where(result)]
    for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in result["rows"]):
        rows = [
            {**row, "least_ms": min(row["ms"])}
            for row in result["rows"]
            if (row["shape"], row["tokens"]) == (shape, tokens)
        ]
        baseline = next((row for row in rows if row["contender"] == BASELINE), None)
        parts.append(f"{shape}, weights {rows[0]['weights'].removeprefix('torch.')}, {tokens:,} tokens a step:")
        parts.append(markdown_table(HEADER, [_cells(row, baseline) for row in rows]))
    return "\n\n".join(parts)


def where(result: dict[str, Any]) -> str:
    """Return date, device, versions and data types in one sentence, and the outcome of the tests in another."""
    environment, settings = result["environment"], result["settings"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "peft", "transformers"))
    said = (
        f"{environment['date'][:10]}, {environment['device']}, {versions}, autocast to "
        f"{settings['autocast'].removeprefix('torch.')}, median of {settings['rounds']} steps."
    )
    return f"{said} Tests on it: {result['tests']['summary']}." if "tests" in result else said


def _cells(row: dict[str, Any], baseline: dict[str, Any] | None) -> tuple[str, ...]:
    return (
        row["contender"],
        f"{row['trained']:,}",
        *_times(row, baseline),
        f"{row['kept_bytes'] / 1e6:,.0f} MB",
        _ratio("kept_bytes", row, baseline),
        f"{row['peak_bytes'] / 1e6:,.0f} MB",
        _ratio("peak_bytes", row, baseline),
        "" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:,.1f} MB",
        "" if row["warmup_in_steps"] is None else f"{row['warmup_in_steps']:.0f}",
    )


def _times(row: dict[str, Any], baseline: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the cells of the step's time; how noisy the machine is shows in the quartiles."""
    lower, upper = np.quantile(row["ms"], [0.25, 0.75])
    return (
        f"{row['median_ms']:.1f} ms",
        _ratio("median_ms", row, baseline),
        f"{lower:.1f} to {upper:.1f} ms",
        f"{row['least_ms']:.1f} ms",
        _ratio("least_ms", row, baseline),
    )


def _ratio(name: str, row: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    return "" if baseline is None else f"{row[name] / baseline[name]:.2f}"
