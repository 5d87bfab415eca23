"""The layers that train, and the share of them that does: every third block's up and down projections in the paper."""

from __future__ import annotations

import re

from torch import nn

from experiments.attachment import masks_gradients
from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.common.targets.modules import in_out_features, is_linear

LARGE_DENSITY = 0.05  # the paper's 100,000 values are 0.2% of a layer of LLaMA-2 7B


def select_layers(model: nn.Module, names: list[str], every: int) -> dict[str, int]:
    """Entries of the weight of each linear layer with one of the names in the blocks 0, `every`, 2 `every`, ...

    A block's index is the first number in a module's full name, as in `model.layers.3.mlp.up_proj`.

    Raises:
        InputError: A name is no linear layer's of these blocks.
    """
    found, missing = {}, set(names)
    for full_name, module in model.named_modules():
        block = re.search(r"(?:^|\.)(\d+)\.", full_name)
        name = next((name for name in names if f".{full_name}".endswith(f".{name}")), None)
        if name is None or block is None or int(block[1]) % every or not is_linear(module):
            continue
        in_features, out_features = in_out_features(module)
        found[full_name] = in_features * out_features
        missing.discard(name)
    if missing:
        raise InputError(
            f"the model has no linear layer named {', '.join(sorted(missing))} in its blocks 0, {every}, {2 * every}, "
            "...: name others with --target-modules"
        )
    return found


def find_density(method: str, layers: dict[str, int], density: float | None, num_values: int) -> float:
    """The share of each layer that trains: `density`, or what makes `num_values` of a layer.

    Raises:
        InputError: The layers are too small for so many values, or differ in size, where only a share is the same.
    """
    if density is not None or trains_whole_layers(method):
        return density or 1.0
    sizes = sorted(set(layers.values()))
    if num_values > sizes[0]:
        raise InputError(
            f"--num-values {num_values:,} is more than the {sizes[0]:,} entries of a layer: give fewer, or a --density"
        )
    if len(sizes) > 1:
        raise InputError(f"the layers have {sizes[0]:,} to {sizes[-1]:,} entries: give a --density for all of them")
    return num_values / sizes[0]


def trains_whole_layers(method: str) -> bool:
    """Return whether the method has no use for a density: full fine-tuning, and GradDrop."""
    return method == "full" or masks_gradients(method)
