"""Figures of the scores: along the epochs, gain in each language, t statistics. As bytes of PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # needs no display
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from .comparison import ALPHA, PairedTest, fractional_gains, gains
from .scores import EpochRule, TaskResults
from .tables import NOTHING, counts, p_value

# Okabe and Ito's colours, which colour-blind people can tell apart; yellow, too light for lines, is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
BASELINE = {"color": "#000000", "linestyle": "-", "marker": "", "linewidth": 2.5}
ABOVE, BELOW = COLOURS[0], COLOURS[1]
DIVERGING = "PuOr"  # orange below 0, purple above: another pair that colour-blind people can tell apart
RC: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def style() -> AbstractContextManager[Any]:
    return matplotlib.rc_context(RC)


def looks(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A line of its own for each method: black for the first, which is the baseline."""
    baseline, *others = methods
    styles: dict[str, dict[str, Any]] = {baseline: BASELINE}
    for i, method in enumerate(others):
        line, marker = STYLES[i // len(COLOURS) % len(STYLES)]
        styles[method] = {"color": COLOURS[i % len(COLOURS)], "linestyle": line, "marker": marker, "markersize": 4}
    return styles


def epoch_figure(results: TaskResults) -> bytes:
    """The mean over languages after each epoch; a band of one standard error over the seeds (the paper's figure 2)."""
    with style():
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        axis = figure.subplots()
        for method, look in looks(results.epochs).items():
            curves = np.array([_curve(results, epochs) for epochs in results.epochs[method].values()])
            mean, epochs = curves.mean(axis=0), np.arange(1, curves.shape[1] + 1)
            axis.plot(epochs, mean, label=method, **look)
            if len(curves) > 1:
                error = curves.std(axis=0, ddof=1) / math.sqrt(len(curves))
                axis.fill_between(epochs, mean - error, mean + error, color=look["color"], alpha=0.12, linewidth=0)
        axis.set(xlabel="epoch", ylabel=f"{results.task.metric}, mean over languages (%)", title=_title(results))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25, linewidth=0.5)
        figure.legend(loc="outside right center", frameon=False)
        return _png(figure)


def _curve(results: TaskResults, epochs: list[Any]) -> list[float]:
    return [
        float(np.mean([scores[language][results.task.metric] for language in results.languages])) for scores in epochs
    ]


def _title(results: TaskResults) -> str:
    run, seeds = results.runs[0], counts(len(epochs) for epochs in results.epochs.values())
    return f"{results.task.name}, {run.split} set, {run.model.rstrip('/').rpartition('/')[2]}, seeds: {seeds}"


def gain_figure(results: TaskResults, baseline: str, rule: EpochRule) -> bytes | None:
    """The gain over the baseline in each language (the paper's figure 4), in points and as a share of its score.

    None without another method to compare.
    """
    kinds = {
        "percentage points": gains,
        "% of its score": fractional_gains,
    }
    methods = [m for m in results.epochs if m != baseline and gains(results, m, baseline, rule)]
    if not methods:
        return None
    names = ("gain", "fractional gain")
    with style():
        size = (3.2 + 0.62 * len(results.languages), 2 * (1.6 + 0.34 * len(methods)))
        figure = Figure(figsize=size, layout="constrained")
        for axis, name, (label, measure) in zip(figure.subplots(2), names, kinds.items(), strict=True):
            rows = {method: measure(results, method, baseline, rule) for method in methods}
            image = _gain_map(axis, rows)
            axis.set(xlabel="language", title=f"{results.task.name}, {results.task.metric}: {name} over {baseline}")
            figure.colorbar(image, ax=axis, label=label)
        return _png(figure)


def _gain_map(axis: Axes, rows: Mapping[str, Mapping[str, float]]) -> AxesImage:
    """Draw numbers by method and language, and return the image; a NaN is a dash."""
    values = np.array([list(row.values()) for row in rows.values()])
    limit = np.nanmax(np.abs(values), initial=0.0) or 1.0
    image = axis.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    axis.set_xticks(range(values.shape[1]), list(next(iter(rows.values()))))
    axis.set_yticks(range(len(values)), list(rows))
    for (row, column), value in np.ndenumerate(values):
        text = NOTHING if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}"
        colour = "white" if abs(value) > 0.5 * limit else "black"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return image


def t_figure(tests: Mapping[str, PairedTest], baseline: str) -> bytes:
    """The t statistic of each method (the paper's figure 3), and how far from 0 it has to be."""
    with style():
        figure = Figure(figsize=(7, 1.6 + 0.34 * len(tests)), layout="constrained")
        axis = figure.subplots()
        for row, test in enumerate(tests.values()):
            axis.barh(row, test.statistic, height=0.6, color=ABOVE if test.statistic > 0 else BELOW)
            axis.text(1.02, row, p_value(test), transform=axis.get_yaxis_transform(), va="center")
            axis.plot([-test.critical, test.critical], [row, row], "|", color="#000000", markersize=14)
        axis.axvline(0, color="#000000", linewidth=0.8)
        axis.text(1.02, -1, "p", transform=axis.get_yaxis_transform(), va="center")
        axis.set_yticks(range(len(tests)), list(tests))
        axis.set_ylim(len(tests) - 0.4, -0.6)
        axis.set(
            xlabel=f"t of the difference to {baseline}, paired over tasks (marks: p = {ALPHA:g})",
            title=f"paired t-test over {counts(test.tasks for test in tests.values())} tasks",
        )
        return _png(figure)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()
