"""Figures of the results, one for each task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_sparsegrad.cli.errors import InputError

from .selection import Series, final, load, series_of
from .tasks import TASKS

# Okabe and Ito's colours, which colour-blind people can tell apart; yellow, too light for lines, is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
CHARACTERS = 190  # that fit beside each other under a figure
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "peft_sparsegrad",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plot(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write a PNG and an SVG for each task, and each setting, in the files. Returns their paths.

    Raises:
        InputError: If a file cannot be read or has no result, or matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install peft-sparsegrad[plot]") from error
    groups = [
        (results, [each for each in series_of(results) if each.task == task])
        for results in load(paths)
        for task in sorted({run.task for run in results})
    ]
    folder.mkdir(parents=True, exist_ok=True)
    totals, seen, written = Counter(series[0].task for _, series in groups), Counter(), []
    with matplotlib.rc_context(STYLE):
        for results, series in groups:
            task = series[0].task
            seen[task] += 1
            name = f"{task}-{seen[task]}" if totals[task] > 1 else task
            run = next(iter(results))
            title = f"{task}, {run.model.rpartition('/')[2]}, {run.train_rows} × {run.epochs} {TASKS[task].unit}"
            written += _write(series, title, folder / name)
    return written


def _write(series: list[Series], title: str, stem: Path) -> list[Path]:
    from matplotlib.figure import Figure  # needs no display

    figure = Figure(figsize=(14, 4.6 + 0.16 * len(series)), layout="constrained")
    axes = figure.subplots(1, 3)
    looks = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": line, "marker": marker, "markersize": 4}
        for i in range(len(series))
        for line, marker in [STYLES[i // len(COLOURS) % len(STYLES)]]
    ]
    for axis, panel in zip(axes, (_along_training, _at_the_end, _by_rate), strict=True):
        panel(axis, series, looks)
        axis.grid(alpha=0.25, linewidth=0.5)
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, min(4, CHARACTERS // (max(map(len, labels)) + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    figure.savefig(png, dpi=130, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]


def _along_training(axis: Any, series: list[Series], looks: list[dict[str, Any]]) -> None:
    """Mean dev loss after each evaluation; the band is one standard error, and its label says at which rate."""
    for each, look in zip(series, looks, strict=True):
        evaluations = [record["evaluations"] for record in each.records.values()]
        steps = [scores["step"] for scores in evaluations[0]]
        losses = np.array([[scores["loss"] for scores in one] for one in evaluations])
        mean = losses.mean(axis=0)
        axis.plot(steps, mean, label=f"{each.label} (lr {each.best:g}, {len(losses)} seeds)", **look)
        if len(losses) > 1:
            error = losses.std(axis=0, ddof=1) / len(losses) ** 0.5
            axis.fill_between(steps, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)
    axis.set(xlabel="optimisation steps", ylabel=_loss_label(series), title="along training: mean ± standard error")


def _at_the_end(axis: Any, series: list[Series], looks: list[dict[str, Any]]) -> None:
    """A dot for each seed and a bar for the mean."""
    for position, (each, look) in enumerate(zip(series, looks, strict=True)):
        losses = [final(record, "loss") for record in each.records.values()]
        axis.plot(losses, [position] * len(losses), **{**look, "linestyle": ""}, alpha=0.6)
        axis.plot([np.mean(losses)], [position], color=look["color"], marker="|", markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(series)), [each.label for each in series])
    axis.invert_yaxis()
    axis.set(xlabel=_loss_label(series), title="at the end: each seed, mean as a bar")


def _by_rate(axis: Any, series: list[Series], looks: list[dict[str, Any]]) -> None:
    """Mean final dev loss for every learning rate tried."""
    for each, look in zip(series, looks, strict=True):
        losses = [np.mean([final(record, "loss") for record in same.values()]) for same in each.rates.values()]
        axis.plot(list(each.rates), losses, **look)
    axis.set_xscale("log")
    axis.set(xlabel="peak learning rate", ylabel=_loss_label(series), title="at the end, for every learning rate")


def _loss_label(series: list[Series]) -> str:
    return f"dev loss ({TASKS[series[0].task].loss})"
