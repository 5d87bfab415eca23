"""The tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from .targets import Target


def print_step(console: Console, family: str, batches: dict[str, dict[str, Any]]) -> None:
    """One table for each batch of one model."""
    for batch, measured in batches.items():
        columns = ("", "trained", "step", "/ LoRA's", "(min - max)", "CPU", "kept", "/ LoRA's", "peak", "/ LoRA's")
        rows = [_step_row(name, one, measured["lora"]) for name, one in measured.items()]
        console.print(_table(f"Training step, {family}, {batch}", columns, rows))


def _step_row(name: str, one: dict[str, Any], lora: dict[str, Any]) -> tuple[str, ...]:
    ratio = one["to_lora"]
    return (
        name,
        f"{one['trained']:,}",
        f"{one['median_seconds'] * 1e3:.0f} ms",
        f"{ratio['median']:.3f}",
        f"{ratio['min']:.2f} - {ratio['max']:.2f}",
        f"{one['cpu_to_lora']['median']:.3f}",
        megabytes(one["kept_bytes"]),
        f"{one['kept_bytes'] / lora['kept_bytes']:.2f}",
        megabytes(one["peak_bytes"]),
        f"{one['peak_bytes'] / lora['peak_bytes']:.2f}",
    )


def print_warmup(console: Console, warmup: dict[str, Any]) -> None:
    """The accumulators and the stacked SVD, and the sketch on a flat spectrum."""
    columns = ("", "time", "speed", "sweeps", "held", "peak", f"angle, rank {warmup['angle_rank']}", "energy in core")
    rows = [_warmup_row(name, one) for name, one in warmup["methods"].items()]
    console.print(_table(f"Warm-up, stack {tuple(warmup['stack'])}, core {tuple(warmup['core'])}", columns, rows))
    shares = ", ".join(f"{share:.3f}" for share in warmup["flat spectrum"]["sketch_share_by_sweep"])
    console.print(f"Flat spectrum: share of the exact basis's energy in the sketch's, sweep by sweep: {shares}\n")


def _warmup_row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    streamed = "angle_in" in one
    return (
        name,
        f"{one['seconds']:.1f} s",
        f"{one['speed_ratio']:.1f} ×" if streamed else "1 ×",
        str(one.get("sweeps", "")),
        " / ".join(f"{megabytes(held)} ({n})" for n, held in one.get("held_bytes", {}).items()),
        megabytes(one["peak_bytes"]),
        f"{max(one['angle_in'], one['angle_out']):.1e}" if streamed else "",
        f"{one['energy']:.4f}",
    )


def print_graddrop(console: Console, family: str, measured: dict[str, dict[str, Any]]) -> None:
    """One table for each model."""
    columns = ("", "step", "/ full's", "(min - max)", "/ p = 0's", "skipped", "/ share", "kept", "peak")
    rows = [
        (
            name,
            f"{one['median_seconds'] * 1e3:.0f} ms",
            f"{one['to_full']['median']:.3f}",
            f"{one['to_full']['min']:.2f} - {one['to_full']['max']:.2f}",
            f"{one['to_off']['median']:.3f}",
            f"{one['skipped']:.0%}",
            f"{one['to_proportion']['median']:.3f}",
            megabytes(one["kept_bytes"]),
            megabytes(one["peak_bytes"]),
        )
        for name, one in measured.items()
    ]
    console.print(_table(f"Training everything in the blocks, {family}", columns, rows))


def print_bytes(console: Console, measured: dict[str, dict[str, Any]]) -> None:
    """Adapter files of the GradDrop variants."""
    columns = ("", "entries", "epoch 1", "epoch 2", "epoch 3", "bytes an entry", "largest 1%")
    rows = [
        (
            name,
            f"{one['entries']:,}",
            *map(megabytes, one["after_epoch"]),
            f"{one['after_epoch'][0] / one['entries']:.2f} - {one['after_epoch'][-1] / one['entries']:.2f}",
            megabytes(one["largest_1%"]),
        )
        for name, one in measured.items()
    ]
    console.print(_table("Adapter files of GradDrop", columns, rows))


def print_targets(console: Console, targets: Iterable[Target]) -> None:
    """Every target, met or missed."""
    rows = [
        (t.subject, f"{t.measured:.3g}", f"{'≥' if t.at_least else '≤'} {t.limit:g}", "met" if t.met else "MISSED")
        for t in targets
    ]
    if rows:
        console.print(_table("Targets", ("", "measured", "target", ""), rows))


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    return table
