"""The share of GradDrop's entries that trains in each transformer block and epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ..graddrop import GradDropConfig
from ..graddrop.mask_sampler import MaskSampler
from .style import COLOUR_MAP, panels, styled

_MOST_NUMBERS = 200  # cells that get their number written in


def active_shares(config: GradDropConfig, blocks: Sequence[str], num_epochs: int | None = None) -> np.ndarray:
    """Return the share of entries that train, shape (blocks, epochs), in [0, 1]; only the settings are needed.

    Masks that last an epoch give each block a share of its own: 0 or 1 for whole blocks, the probability for single
    entries. Masks that are drawn in every step give the expected share of the epoch.

    Args:
        config: The GradDrop settings.
        blocks: Names of the transformer blocks that the settings govern, from the input on.
        num_epochs: Number of epochs of the run; None for the configuration's.

    Raises:
        ValueError: If the number of epochs is not known, or too small for these settings.
    """
    masks = MaskSampler(config, blocks)
    if num_epochs is not None:
        masks.set_num_epochs(num_epochs)
    if masks.num_epochs is None:
        raise ValueError("the number of epochs is not known: `num_epochs` is None in the settings")
    shares = np.zeros((len(blocks), masks.num_epochs))
    for epoch in range(masks.num_epochs):
        masks.set_epoch(epoch)
        for row, block in enumerate(blocks):
            shares[row, epoch] = _share(masks, block)
    return shares


@styled
def active_entries(
    config: GradDropConfig, blocks: Sequence[str], num_epochs: int | None = None, title: str = ""
) -> Figure:
    """Draw `active_shares` as a map of blocks and epochs.

    Args:
        config: The GradDrop settings.
        blocks: Names of the transformer blocks that the settings govern, from the input on.
        num_epochs: Number of epochs of the run; None for the configuration's.
        title: Title of the figure; by default it names the settings.

    Raises:
        ValueError: If the number of epochs is not known, or too small for these settings.
    """
    shares = active_shares(config, blocks, num_epochs)
    rows, epochs = shares.shape
    figure, axes = panels(1, 1, max(5.4, 3.0 + 0.55 * epochs), max(3.2, 1.4 + 0.28 * min(rows, 30)))
    axis = axes[0, 0]
    image = axis.imshow(100 * shares, cmap=COLOUR_MAP, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axis.set(xlabel="epoch (from 1)", ylabel="layer, from the input on", title=title or _title(config))
    step = -(-rows // 30)
    axis.set_yticks(range(0, rows, step), [str(blocks[row]) for row in range(0, rows, step)])
    axis.set_xticks(range(epochs), [str(epoch + 1) for epoch in range(epochs)])
    if rows * epochs <= _MOST_NUMBERS:
        for (row, epoch), share in np.ndenumerate(shares):
            axis.text(epoch, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                      color="black" if share > 0.6 else "white")  # fmt: skip
    figure.colorbar(image, ax=axis).set_label("entries that train, %")
    return figure


def _share(masks: MaskSampler, block: str) -> float:
    """Return the share of one block's entries that train in the epoch that was announced."""
    if masks.config.interval == "epoch":
        return masks.mask(block, block).share
    return 1.0 if masks.config.noise == "gaussian" else 1.0 - masks.rate


def _title(config: GradDropConfig) -> str:
    settings = f"{config.selection}, each {config.interval}"
    return f"GradDrop by {config.granularity}: {settings}" + (", toggled" if config.toggle else "")
