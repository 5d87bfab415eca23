"""Markdown tables of the frontier."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare.difference import interval, verdict
from experiments.json_files import Record
from experiments.tables import markdown_table

from .methods import METHODS
from .selection import Series, best_lora, half_width, load
from .tasks import METRICS

NOTHING = "–"
ELSEWHERE = "‡"
HEADER = [
    "method",
    "learning rate",
    "seeds",
    "{}",
    "less the best LoRA",
    "",
    "trained values",
    "file MB",
    "ms per step",
]
HEADER += ["kept MB", "peak MB", "warm-up passes"]
FORGETTING = ["loss on other text", "change", "questions right"]


def tables(results: Sequence[Path], costs: Sequence[Path]) -> str:
    """Return a table for each task.

    Raises:
        InputError: As `selection.load` does.
    """
    return "\n\n".join(_table(task, series) for task, series in load(results, costs).items())


def _table(task: str, series: list[Series]) -> str:
    metric, higher = METRICS[task]
    reference = best_lora(series, higher)
    forgets = "other_loss" in next(iter(series[0].records.values()))["after"]
    header = [cell.format(metric) for cell in HEADER] + (FORGETTING if forgets else [])
    rows = [_row(each, reference, higher) + (_forgetting(each) if forgets else []) for each in series]
    for row, each in zip(rows, series, strict=True):
        row[0] += ELSEWHERE if _device(each) != _device(series[0]) else ""
    return f"{_caption(task, series, reference)}\n\n{markdown_table(header, rows)}"


def _caption(task: str, series: list[Series], reference: Series | None) -> str:
    record = next(iter(series[0].records.values()))
    run, where = record["run"], record["environment"]
    compared = f"Differences, paired by seed, are to {reference.method}, the best LoRA. " if reference else ""
    return (
        f"{task}, {run['model']}: {run['steps']} passes of {run['batch_size']}, {run['precision']}, "
        f"{where['device']}, torch {where['torch']}. Mean and 95% interval of Student's t over the seeds. {compared}"
        "Each method is at the learning rate that did best on the search's rows with the first seed; * marks one at "
        f"the edge of those tried, † the only one tried.{_runs_elsewhere(series)}"
        f"{_where_costs_are_from(series, where)}{_not_run(series)}"
    )


def _device(series: Series) -> str:
    device = next(iter(series.records.values()))["environment"]["device"]
    return "a CPU" if device == "cpu" else device


def _runs_elsewhere(series: list[Series]) -> str:
    """Return a sentence on the rows that ran on another machine than the first, if there are any."""
    others = [each for each in series if _device(each) != _device(series[0])]
    if not others:
        return ""
    base = series[0].mean(lambda record: record["before"]["score"])
    change = statistics.fmean(each.mean(lambda record: record["before"]["score"]) - base for each in others)
    devices = " and ".join(sorted({_device(each) for each in others}))
    return f" {ELSEWHERE} ran on {devices}, where the base model's score differs by {change:+.4f}."


def _not_run(series: list[Series]) -> str:
    """Return a sentence with the methods of the benchmark that have no result yet, if there are any."""
    missing = [method for method in METHODS if all(each.method != method for each in series)]
    return f" Not run: {'; '.join(missing)}." if missing else ""


def _where_costs_are_from(series: list[Series], where: Record) -> str:
    """Return a sentence on where step time and memory were measured, if not where the runs were."""
    places = {line["environment"]["device"] for each in series if (line := each.costs)} - {where["device"]}
    if not places:
        return ""
    names = ["a CPU" if place == "cpu" else place for place in sorted(places)]
    return f" Step time and memory are from another machine, {' and '.join(names)}: only their ratios say something."


def _row(series: Series, reference: Series | None, higher: bool) -> list[str]:
    record = next(iter(series.records.values()))
    trained = record["trained_parameters"]
    return [
        series.method,
        f"{series.lr:g}{'*' if series.at_edge else '†' if series.not_searched else ''}",
        str(len(series.records)),
        _with_interval(series.scores),
        *_difference(series, reference, higher),
        f"{trained:,}",
        f"{record['adapter_bytes'] / 1e6:.2f}",
        _cost(series, "seconds_per_step", 1e3),
        _cost(series, "kept_memory", 1e-6),
        _cost(series, "peak_memory", 1e-6),
        str(record["warmup_passes"]),
    ]


def _difference(series: Series, reference: Series | None, higher: bool) -> tuple[str, str]:
    if reference is None or series is reference:
        return NOTHING, NOTHING
    seeds = sorted(set(series.records) & set(reference.records))
    values = [series.records[seed]["score"] - reference.records[seed]["score"] for seed in seeds]
    if len(values) < 2:
        return (f"{values[0]:+.4f}", "one seed") if values else (NOTHING, NOTHING)
    low, high = interval(values)
    return f"{statistics.fmean(values):+.4f} ({low:+.4f} to {high:+.4f})", verdict(low, high, higher)


def _forgetting(series: Series) -> list[str]:
    losses = [record["after"]["other_loss"] for record in series.records.values()]
    changes = [record["after"]["other_loss"] - record["before"]["other_loss"] for record in series.records.values()]
    after = series.mean(lambda record: record["after"]["questions_right"])
    before = series.mean(lambda record: record["before"]["questions_right"])
    return [_with_interval(losses), f"{statistics.fmean(changes):+.4f}", f"{after:.1f}, before {before:.0f}"]


def _with_interval(values: Sequence[float]) -> str:
    width = half_width(values)
    return f"{statistics.fmean(values):.4f}" + ("" if width is None else f" ± {width:.4f}")


def _cost(series: Series, name: str, unit: float) -> str:
    value = series.costs.get(name)
    return NOTHING if value is None else f"{value * unit:.1f}"
