"""∂L/∂Y of a layer (the paper's figure 3): its rows of zeros, and the share that is not zero through training.

Figure after Chekalina et al., *SparseGrad* (2024.emnlp-main.831), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .nonzero_shares import ENERGY, NonzeroShares, nonzero_shares
from .style import COLOUR_MAP, COLOURS, panels, pooled, styled, tidy

_DECADES = 6  # range of magnitudes below the largest that colours tell apart
_ZERO = "#FFFFFF"  # no colour of the map
_BINS = np.geomspace(0.01, 100, 49)  # %; the first also holds what is less


@styled
def output_gradient_rows(gradient: torch.Tensor, V: torch.Tensor | None, title: str = "") -> Figure:
    """Draw magnitudes of ∂L/∂Y, a row for each token, before and after the change of basis; exact zeros are white.

    Args:
        gradient: ∂L/∂Y, shape (tokens, out).
        V: Output transition matrix (out, r_out), or None for the identity: then there is one panel.
        title: Title of the figure, for instance the name of the layer.

    Raises:
        ValueError: If the shapes do not match, or the gradient is zero or not finite.
    """
    dy = gradient.detach().float().cpu()
    if dy.ndim != 2 or (V is not None and (V.ndim != 2 or len(V) != dy.shape[1])):
        shapes = [None if m is None else tuple(m.shape) for m in (dy, V)]
        raise ValueError(f"a gradient (tokens, out) and V (out, r_out) are needed, not {shapes}")
    shares = nonzero_shares(dy, V)
    if not shares.entries:
        raise ValueError("the gradient is zero")
    drawn = [(dy.abs(), f"own basis: ∂L/∂Y, {_percent(shares.needed)}", "output feature")]
    if V is not None and shares.needed_changed is not None:
        changed = (dy @ V.detach().float().cpu()).abs()
        drawn.append((changed, f"change of basis: ∂L/∂Y V, {_percent(shares.needed_changed)}", "column of V"))
    figure = _heat_maps(drawn)
    counts = f"{shares.rows:.1%} of the rows and {shares.entries:.1%} of the entries are not zero"
    figure.suptitle(f"{title}\n{counts}" if title else counts)
    return figure


def _percent(needed: float) -> str:
    return f"{ENERGY:.0%} of ‖·‖² in {needed:.1%}"


def _heat_maps(drawn: Sequence[tuple[torch.Tensor, str, str]]) -> Figure:
    """Draw magnitudes (tokens, features) beside each other on one colour scale, with their titles and x labels."""
    largest = max(matrix.max().item() for matrix, _, _ in drawn)
    scale = LogNorm(largest * 10.0**-_DECADES, largest, clip=True)
    colours = matplotlib.colormaps[COLOUR_MAP].with_extremes(bad=_ZERO)
    figure, axes = panels(1, len(drawn), 4.6, 4.4)
    for axis, (matrix, name, label) in zip(axes[0], drawn, strict=True):
        cells, how = pooled(matrix)
        axis.imshow(
            np.ma.masked_equal(cells, 0), norm=scale, cmap=colours, aspect="auto", interpolation="nearest",
            extent=(0, matrix.shape[1], matrix.shape[0], 0),
        )  # fmt: skip
        axis.set(title=name, xlabel=f"{label}\n{how}" if how else label, ylabel="token")
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes[0].tolist(), extend="min", shrink=0.85)
    bar.set_label("|entry|, loss per unit of output (white: exactly 0)")
    return figure


@styled
def nonzero_over_training(shares: Mapping[str, Sequence[NonzeroShares]], title: str = "") -> Figure:
    """Draw how much of ∂L/∂Y is not zero: a histogram over layers and backward passes, and the course of training.

    The course is the mean over the layers; a band goes from the least of them to the most.

    Args:
        shares: By the name of a layer, its shares in each backward pass, as `recorded_nonzero_shares` finds them.
        title: Title of the figure.

    Raises:
        ValueError: If there is no layer or no backward pass, or not as many for each layer.
    """
    lengths = {len(passes) for passes in shares.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"the same number of backward passes of every layer is needed, not {sorted(lengths)}")
    figure, axes = panels(1, 2, 4.8, 3.6)
    for number, (name, values) in enumerate(_kinds(shares).items()):
        axes[0, 0].hist(values.ravel(), bins=_BINS.tolist(), histtype="step", label=name, **_look(number))
        _course(axes[0, 1], values, number)
    axes[0, 0].set(xlabel="share of ∂L/∂Y, %", ylabel="layers × backward passes", title="histogram", xscale="log")
    axes[0, 1].set(xlabel="backward pass", ylabel="share of ∂L/∂Y, %", title="through training", yscale="log")
    for axis in axes[0]:
        tidy(axis)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def _kinds(shares: Mapping[str, Sequence[NonzeroShares]]) -> dict[str, np.ndarray]:
    """Return the percentages (layers, backward passes), at least 0.01, by what is counted; the basis only with V."""
    names = {
        "rows": "rows that are not 0",
        "entries": "entries that are not 0",
        "needed": f"largest entries with {ENERGY:.0%} of the energy",
        "needed_changed": f"the same in the basis V ({ENERGY:.0%})",
    }
    kinds = {
        label: [[getattr(each, field) for each in passes] for passes in shares.values()]
        for field, label in names.items()
    }
    return {
        label: np.maximum(100 * np.array(values, dtype=float), _BINS[0])
        for label, values in kinds.items()
        if not any(value is None for row in values for value in row)
    }


def _look(number: int) -> dict[str, Any]:
    """Return the look of a curve; without dropout the first two coincide, and the wider one shows below the other."""
    return {"color": COLOURS[number], "linewidth": 4.0 if number == 0 else 1.5, "alpha": 0.5 if number == 0 else 1.0}


def _course(axis: Axes, values: np.ndarray, number: int) -> None:
    passes = np.arange(1, values.shape[1] + 1)
    axis.plot(passes, values.mean(axis=0), **_look(number))
    axis.fill_between(passes, values.min(axis=0), values.max(axis=0), color=COLOURS[number], alpha=0.12, linewidth=0)
