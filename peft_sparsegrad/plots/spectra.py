"""The spectra that a warm-up found, and the gradient energy in the core and the support, group by group."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..sparsegrad.warmup.report import GroupReport, WarmUpReport
from .style import COLOURS, look, panels, styled, tidy


@styled
def spectra(report: WarmUpReport) -> Figure:
    """Draw gradient energy along the columns of U and V, its running sum, and the shares of the core and the support.

    A circle marks the rank of the core. A side whose basis is the identity has no spectrum, nor has a basis that was
    read from a file. The shares are medians over the layers, with a stroke at what chance would give.

    Raises:
        ValueError: If the report has neither a spectrum nor a captured energy.
    """
    curves = [
        (f"{group.name} {side}", 100 * np.asarray(values, dtype=float) / group.energy, rank)
        for group in report.groups
        for side, values, rank in (
            ("(U)", group.spectrum_in, group.core_shape[1]),
            ("(V)", group.spectrum_out, group.core_shape[0]),
        )
        if group.energy and sum(values) > 0
    ]
    measured = [group for group in report.groups if group.energy_in_core is not None]
    if not curves and not measured:
        raise ValueError("the report has no spectrum and no captured energy: it is of a warm-up without data")
    drawn = [part for part, there in ((_along_columns, curves), (_running_sum, curves)) if there]
    figure, axes = panels(1, len(drawn) + bool(measured), 4.4, 3.8)
    for axis, draw in zip(axes[0], drawn, strict=False):
        draw(axis, curves)
    if curves:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    if measured:
        _captured(axes[0, -1], measured)
    passes, seconds = report.passes, report.seconds
    figure.suptitle(f"Warm-up: {passes} backward passes in {seconds:.1f} s")
    return figure


Curve = tuple[str, np.ndarray, int]  # name, energy along each leading column in percent, rank of the core


def _along_columns(axis: Axes, curves: list[Curve]) -> None:
    smallest = 1.0
    for number, (name, share, rank) in enumerate(curves):
        columns = np.arange(1, len(share) + 1)
        axis.plot(columns, np.maximum(share, 1e-12), label=name, **look(number))
        axis.plot(rank, max(share[rank - 1], 1e-12), "o", color=look(number)["color"], markersize=5)
        smallest = min(smallest, share[share > 1e-8].min())
    axis.set(xlabel="column of U or V", ylabel="gradient energy along it, %", yscale="log", ylim=(smallest / 2, 120))
    axis.set_title("spectrum (circle: rank of the core)")
    tidy(axis)


def _running_sum(axis: Axes, curves: list[Curve]) -> None:
    for number, (_, share, rank) in enumerate(curves):
        held = share.cumsum()
        axis.plot(np.arange(1, len(held) + 1), held, **look(number))
        axis.plot(rank, held[rank - 1], "o", color=look(number)["color"], markersize=5)
    axis.set(xlabel="leading columns of U or V", ylabel="gradient energy in them, %", ylim=(0, 102))
    axis.set_title("energy in the leading columns")
    tidy(axis)


def _captured(axis: Axes, groups: list[GroupReport]) -> None:
    positions = np.arange(len(groups))
    for offset, name, colour in ((-0.2, "core", COLOURS[0]), (0.2, "support", COLOURS[1])):
        shares = [100 * (getattr(group, f"energy_in_{name}") or 0.0) for group in groups]
        bars = axis.barh(positions + offset, shares, height=0.36, color=colour, label=f"in the {name}")
        axis.bar_label(bars, fmt="%.0f%%", padding=2, fontsize=8)
        chances = [100 * getattr(group, f"chance_in_{name}") for group in groups]
        label = "by chance" if name == "core" else None
        axis.plot(chances, positions + offset, "|", color="black", markersize=11, label=label)
    axis.set_yticks(positions, [_two_lines(group.name) for group in groups])
    axis.invert_yaxis()
    axis.set(xlabel="share of a warm-up gradient's energy ‖G‖², %", xlim=(0, 112), title="energy captured")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    tidy(axis)


def _two_lines(name: str) -> str:
    """Return a module's name with its last part on a line of its own."""
    front, _, last = name.rpartition(".")
    return f"{front}.\n{last}" if len(name) > 16 and front else name
