"""The picture of the frontier: score against step time, memory, trained values and file size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.plot import COLOURS, STYLE
from peft_sparsegrad.cli.errors import InputError

from .selection import Series, half_width, load
from .tasks import METRICS

MARKERS = "osD^vP*Xhp<>"


@dataclass(frozen=True)
class Panel:
    """A cost along the horizontal axis.

    Attributes:
        label: Of the axis.
        value: The cost of a series; None where it is not known.
        logarithmic: Whether the axis is.
    """

    label: str
    value: Callable[[Series], float | None]
    logarithmic: bool


def _measured(name: str, unit: float) -> Callable[[Series], float | None]:
    return lambda series: series.costs[name] * unit if name in series.costs else None


def _of_run(name: str, unit: float) -> Callable[[Series], float | None]:
    # A value of 0, as of the frozen model, has no place on a logarithmic axis.
    return lambda series: next(iter(series.records.values()))[name] * unit or None


PANELS = (
    Panel("time of a training step, ms", _measured("seconds_per_step", 1e3), logarithmic=False),
    Panel("peak memory of a step, GB", _measured("peak_memory", 1e-9), logarithmic=False),
    Panel("trained values, millions", _of_run("trained_parameters", 1e-6), logarithmic=True),
    Panel("file to keep, MB", _of_run("adapter_bytes", 1e-6), logarithmic=True),
)


def plot(results: Sequence[Path], costs: Sequence[Path], folder: Path) -> list[Path]:
    """Write a PNG and an SVG for each model in the results. Returns their paths.

    Raises:
        InputError: As `selection.load` does, or if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install peft-sparsegrad[plot]") from error
    folder.mkdir(parents=True, exist_ok=True)
    by_model: dict[str, dict[str, list[Series]]] = {}
    for task, series in load(results, costs).items():
        by_model.setdefault(next(iter(series[0].records.values()))["run"]["model"], {})[task] = series
    with matplotlib.rc_context(STYLE):
        return [path for model, tasks in by_model.items() for path in _draw(tasks, folder / f"frontier_{model}")]


def _draw(tasks: dict[str, list[Series]], stem: Path) -> list[Path]:
    """Draw a row of panels for each task."""
    from matplotlib.figure import Figure  # needs no display

    families = list(dict.fromkeys(each.family for series in tasks.values() for each in series))
    figure = Figure(figsize=(12, 3.3 * len(tasks) + 1), layout="constrained")
    grid = figure.subplots(len(tasks), len(PANELS), squeeze=False, sharey="row")
    for (task, series), row in zip(tasks.items(), grid, strict=True):
        for axis, panel in zip(row, PANELS, strict=True):
            for number, family in enumerate(families):
                _draw_family(axis, [each for each in series if each.family == family], panel, _look(number), family)
            axis.set_xlabel(panel.label)
            axis.grid(alpha=0.25, linewidth=0.5)
            if panel.logarithmic:
                axis.set_xscale("log")
        metric, higher = METRICS[task]
        row[0].set_ylabel(f"{metric}\n({'higher' if higher else 'lower'} is better)")
    found = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in grid.flat]
    handles = {label: handle for pairs in found for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    figure.savefig(png, dpi=130, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]


def _draw_family(axis: Any, series: list[Series], panel: Panel, look: dict[str, Any], label: str) -> None:
    """Draw the methods of a family with 95% intervals, joined by a line in the order of their trained values.

    Those with a single seed have no interval, and are hollow.
    """
    known = [(each, value) for each in series if (value := panel.value(each)) is not None]
    known.sort(key=lambda pair: next(iter(pair[0].records.values()))["trained_parameters"])
    if not known:
        return
    places = [value for _, value in known]
    means = [statistics.fmean(each.scores) for each, _ in known]
    errors = [half_width(each.scores) or 0.0 for each, _ in known]
    axis.errorbar(places, means, errors, label=label, capsize=2, markersize=5, linewidth=1, **look)
    one_seed = [
        (place, mean) for place, mean, (each, _) in zip(places, means, known, strict=True) if len(each.scores) < 2
    ]
    hollow = {**look, "linestyle": "", "markerfacecolor": "white"}
    axis.plot(*zip(*one_seed, strict=True), markersize=5, zorder=3, **hollow)


def _look(number: int) -> dict[str, Any]:
    line = "-" if number < len(COLOURS) else "--"
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": line}
