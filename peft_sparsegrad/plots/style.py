"""The common style of the pictures: colours that colour-blind people can tell apart, and panels of one look.

Functions that draw are decorated with `styled`, so that no picture depends on, or changes, the caller's settings.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours; yellow, too light for lines, is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", ":", "-.")
COLOUR_MAP = "viridis"
RESOLUTION = 130  # dots per inch
styled = matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "axes.axisbelow": True})
MOST_CELLS = 300  # on a side of a heat map: a panel has about as many pixels


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure of `rows` × `columns` panels of `width` × `height` inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(columns * width, rows * height), dpi=RESOLUTION, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def tidy(axis: Axes) -> None:
    """Give a panel with curves or bars the common look."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.5)


def look(number: int) -> dict[str, Any]:
    """Return the colour and the line style of curve number `number`."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
    }


def pooled(matrix: torch.Tensor) -> tuple[np.ndarray, str]:
    """Return a matrix (rows, columns) made small enough for a picture, and a note that says how.

    A cell shows the largest of its entries, because an average would hide the few that are large.
    """
    matrix = matrix.detach().float().cpu()
    size = tuple(min(n, MOST_CELLS) for n in matrix.shape)
    if size == tuple(matrix.shape):
        return matrix.numpy(), ""
    cells = torch.nn.functional.adaptive_max_pool2d(matrix[None, None], size)[0, 0]
    drawn = " × ".join(map(str, size))
    return cells.numpy(), f"(drawn in {drawn} cells, each with its largest entry)"
