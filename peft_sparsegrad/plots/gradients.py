"""A gradient before and after the change of basis: as a heat map (the paper's figure 2), and its sorted magnitudes.

Figures after Chekalina et al., *SparseGrad* (2024.emnlp-main.831), section 3.2.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..functional import Side, is_selection, side_like, to_core
from .style import COLOUR_MAP, look, panels, pooled, styled, tidy

_DECADES = 3  # range of magnitudes below the largest that colours tell apart
_MARK = 0.01  # SparseGrad's default density, which the figure marks


@styled
def gradient_heat_map(
    gradient: torch.Tensor, U: torch.Tensor | None, V: torch.Tensor | None, title: str = ""
) -> Figure:
    """Draw magnitudes of a gradient in the weight's own basis and in the adapter's basis, on one colour scale.

    Args:
        gradient: ∂L/∂W, shape (out, in).
        U: Input transition matrix (in, r_in), or None for the identity.
        V: Output transition matrix (out, r_out), or None for the identity.
        title: Title of the figure, for instance the name of the layer.

    Raises:
        ValueError: If the shapes do not match, or the gradient is zero or not finite.
    """
    before, after = _before_and_after(gradient, U, V)
    largest = max(before.max().item(), after.max().item())
    scale = LogNorm(largest * 10.0**-_DECADES, largest, clip=True)
    figure, axes = panels(1, 2, 4.6, 4.2)
    in_core = after.square().sum() / before.square().sum()
    names = ("own basis: G = ∂L/∂W", f"change of basis: {_product(U, V)}, {in_core:.0%} of ‖G‖²")
    sides = (
        ("input feature (column of W)", "output feature (row of W)"),
        ("column of U" if U is not None else "input feature", "column of V" if V is not None else "output feature"),
    )
    for axis, matrix, name, (x, y) in zip(axes[0], (before, after), names, sides, strict=True):
        image = _heat_map(axis, matrix, scale)
        axis.set(title=name, xlabel=f"{x}{image[1]}", ylabel=y)
    bar = figure.colorbar(image[0], ax=axes[0].tolist(), extend="min", shrink=0.85)
    bar.set_label("|entry|, loss per unit of weight")
    figure.suptitle(title)
    return figure


@styled
def gradient_magnitudes(
    gradient: torch.Tensor, U: torch.Tensor | None, V: torch.Tensor | None, title: str = ""
) -> Figure:
    """Draw the magnitudes of a gradient's entries in descending order, and the share of ‖G‖² in the largest of them.

    In both bases, the number of largest entries is given as a share of the weight's entries.

    Args:
        gradient: ∂L/∂W, shape (out, in).
        U: Input transition matrix (in, r_in), or None for the identity.
        V: Output transition matrix (out, r_out), or None for the identity.
        title: Title of the figure, for instance the name of the layer.

    Raises:
        ValueError: If the shapes do not match, or the gradient is zero or not finite.
    """
    before, after = _before_and_after(gradient, U, V)
    figure, axes = panels(1, 2, 4.6, 3.6)
    total, largest = before.square().sum().item(), max(before.max().item(), after.max().item())
    for number, (matrix, name) in enumerate(((before, "own basis: G"), (after, f"change of basis: {_product(U, V)}"))):
        magnitudes = np.sort(matrix.flatten().double().numpy())[::-1]
        share = 100 * np.arange(1, len(magnitudes) + 1) / before.numel()
        energy = 100 * np.cumsum(magnitudes**2) / total
        marked = energy[np.searchsorted(share, 100 * _MARK, side="right") - 1] if share[0] <= 100 * _MARK else 0
        points = _few(len(magnitudes))
        axes[0, 0].plot(share[points], magnitudes[points], label=name, **look(number))
        axes[0, 1].plot(share[points], energy[points], label=f"{name}, {marked:.0f}% in {_MARK:.0%}", **look(number))
    axes[0, 0].set(yscale="log", ylabel="|entry|, loss per unit of weight", ylim=(largest * 1e-6, 2 * largest))
    axes[0, 1].set(ylabel="share of ‖G‖² in them, %", ylim=(0, 102))
    for axis in axes[0]:
        axis.set(xscale="log", xlabel="largest entries, % of the weight's")
        axis.axvline(100 * _MARK, color="grey", linewidth=0.8, linestyle=":")
        axis.legend(frameon=False)
        tidy(axis)
    figure.suptitle(title)
    return figure


def _before_and_after(
    gradient: torch.Tensor, U: torch.Tensor | None, V: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return |G| and |Vᵀ G U|, float32 on the CPU.

    Raises:
        ValueError: If the shapes do not match, or the gradient is zero or not finite.
    """
    G = gradient.detach().float().cpu()
    if G.ndim != 2 or not all(_fits(side, n) for side, n in zip((V, U), G.shape, strict=True)):
        shapes = [None if m is None else tuple(m.shape) for m in (G, U, V)]
        raise ValueError(f"a gradient (out, in), U (in, r_in) and V (out, r_out) are needed, not {shapes}")
    if not torch.isfinite(G).all() or not G.any():
        raise ValueError("the gradient is zero, or has NaN or infinite entries")
    after = to_core(to_core(G, side_like(U, G)).T, side_like(V, G)).T
    return G.abs(), after.abs()


def _fits(side: Side, features: int) -> bool:
    """Return whether a side is that of a weight with so many features."""
    if side is None:
        return True
    return int(side.max()) < features if is_selection(side) else len(side) == features


def _product(U: torch.Tensor | None, V: torch.Tensor | None) -> str:
    return " ".join([*(["Vᵀ"] if V is not None else []), "G", *(["U"] if U is not None else [])])


def _heat_map(axis: Axes, matrix: torch.Tensor, scale: LogNorm):
    """Draw a matrix, and return the image and a note to add to the label of the axis."""
    cells, how = pooled(matrix)
    extent = (0, matrix.shape[1], matrix.shape[0], 0)
    image = axis.imshow(
        np.maximum(cells, scale.vmin or 0), norm=scale, cmap=COLOUR_MAP, extent=extent, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    return image, f"\n{how}" if how else ""


def _few(count: int, most: int = 2000) -> np.ndarray:
    """Return at most `most` positions up to `count`, evenly spaced on a logarithmic axis."""
    return np.unique(np.geomspace(1, count, num=min(count, most)).astype(int) - 1)
