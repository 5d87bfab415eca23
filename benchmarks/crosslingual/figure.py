"""A figure of the differences to plain fine-tuning, with their intervals."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.compare.difference import interval
from peft_sparsegrad.cli.errors import InputError

from .series import Results, Series, series_of
from .table import differences, groups

COLOURS = {"English": "#56B4E9", "all languages": "#000000", "low-resource": "#D55E00"}


def draw(results: Results, baseline: str, path: Path) -> None:
    """Write a picture with a panel for each task: one row for each method, a mark for each group of languages.

    Args:
        baseline: Label of the method that the others are compared with.
        path: Its ending says which format.

    Raises:
        InputError: If matplotlib is not installed, or there is nothing beside the baseline.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # needs no display
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install peft-sparsegrad[plot]") from error
    by_task: dict[str, list[Series]] = {}
    for each in series_of(results):
        by_task.setdefault(each.task, []).append(each)
    panels = {task: series for task, series in by_task.items() if len(series) > 1}
    panels = {task: series for task, series in panels.items() if any(each.label == baseline for each in series)}
    if not panels:
        raise InputError(f"there is nothing to draw: no task has {baseline!r} and another method")
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        rows = max(map(len, panels.values()))
        figure = Figure(figsize=(4.2 * len(panels) + 1.5, 1.4 + 0.36 * rows), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (task, series) in zip(axes, panels.items(), strict=True):
            _panel(axis, series, baseline)
            axis.set(title=task, xlabel=f"points above {baseline}: mean and 95% interval")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)


def _panel(axis, series: list[Series], baseline: str) -> None:
    other = next(each for each in series if each.label == baseline)
    shown = [each for each in series if each is not other]
    for number, (name, languages) in enumerate(groups(other).items()):
        axis.plot([], [], "o", markersize=4, color=COLOURS[name], label=name)
        for row, each in enumerate(shown):
            if values := differences(each, other, languages):
                mean, height = statistics.fmean(values), row + 0.22 * (number - 1)
                low, high = interval(values) if len(values) > 1 else (mean, mean)
                axis.plot([low, high], [height, height], color=COLOURS[name], linewidth=1.2)
                axis.plot([mean], [height], "o", markersize=4, color=COLOURS[name])
    axis.axvline(0, color="#888888", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [each.label for each in shown])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25, linewidth=0.5)
