"""The positions of the trained entries in the core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from .style import COLOUR_MAP, MOST_CELLS, RESOLUTION, styled

_MOST_LAYERS = 6  # drawn of a group in one picture


@dataclass(frozen=True)
class LayerSupport:
    """The support of one layer.

    Attributes:
        name: Name of the module.
        group: Name of the layer's group; layers of a group are drawn beside each other.
        indices: Flat positions of the trained entries in the core, int64 (k,).
        core_shape: (r_out, r_in).
    """

    name: str
    group: str
    indices: torch.Tensor
    core_shape: tuple[int, int]


@styled
def support_maps(layers: Sequence[LayerSupport], title: str = "") -> Figure:
    """Draw the share of entries that train in every part of each layer's core, with a row of maps for each group.

    If a group has more than 6 layers, 6 evenly spaced ones are drawn.

    Raises:
        ValueError: If there are no layers.
    """
    if not layers:
        raise ValueError("there is no static support to draw")
    groups: dict[str, list[LayerSupport]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    columns = max(len(_evenly_spaced(members)) for members in groups.values())
    width = 2.4 * columns if columns > 1 else 4.6
    figure = Figure(figsize=(width + 0.8, 3.0 * len(groups)), dpi=RESOLUTION, layout="constrained")
    rows = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for row, (group, members) in zip(rows, groups.items(), strict=True):
        shown = _evenly_spaced(members)
        number = "" if len(shown) == len(members) else f", {len(shown)} of {len(members)} layers"
        row.suptitle(f"{group}{number}", fontsize="medium", fontweight="bold")
        _draw_group(row, group, shown, columns)
    if title:
        figure.suptitle(title)
    return figure


def _draw_group(figure: SubFigure, group: str, layers: list[LayerSupport], columns: int) -> None:
    """Draw a map for each layer on one colour scale, beside each other with room for `columns` of them."""
    axes = figure.subplots(1, columns, squeeze=False)[0]
    maps = [100 * _density(layer) for layer in layers]
    scale = Normalize(0, max(cells.max() for cells in maps))
    for axis, layer, cells in zip(axes, layers, maps, strict=False):
        extent = (0, layer.core_shape[1], layer.core_shape[0], 0)
        axis.imshow(cells, norm=scale, cmap=COLOUR_MAP, extent=extent, aspect="auto", interpolation="nearest")
        axis.set(title=_short(layer.name, group), xlabel="column of the core")
    axes[0].set_ylabel("row of the core")
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    bar = figure.colorbar(ScalarMappable(scale, COLOUR_MAP), ax=axes.tolist())
    bar.set_label("entries that train, %")


def _evenly_spaced(layers: list[LayerSupport]) -> list[LayerSupport]:
    if len(layers) <= _MOST_LAYERS:
        return layers
    return [layers[round(i)] for i in np.linspace(0, len(layers) - 1, _MOST_LAYERS)]


def _density(layer: LayerSupport) -> np.ndarray:
    """Return the share of entries in the support, in as many cells of equal size as a small map can show."""
    rows, columns = layer.core_shape
    mask = torch.zeros(rows * columns)
    mask[layer.indices] = 1.0
    size = min(rows, MOST_CELLS // 5), min(columns, MOST_CELLS // 5)
    return torch.nn.functional.adaptive_avg_pool2d(mask.view(1, 1, rows, columns), size)[0, 0].numpy()


def _short(name: str, group: str) -> str:
    """Return the numbers in a layer's name, which tell it apart from the other layers of its group."""
    numbers = [part for part, common in zip(name.split("."), group.split("."), strict=False) if common == "*"]
    return f"layer {'.'.join(numbers)}" if numbers else name
