"""The transformer blocks of a model, which are GradDrop's layers and contain its default targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_USUAL_NAMES = ("layers", "layer", "h", "block", "blocks")


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the transformer blocks, in the model's order.

    A block is an element of an outermost list of modules, where the elements are of one class or the list has one of
    the usual names (`layers`, `h`, ...). An encoder and a decoder each have their own blocks; experts are part of
    the block that contains them.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        if _is_list_of_blocks(name, module) and block_of(name, blocks) is None:
            blocks += [f"{name}.{child}" for child, _ in module.named_children()]
    return blocks


def block_of(name: str, blocks: Iterable[str]) -> str | None:
    """Return the block that contains the module or parameter `name`, or None."""
    return next((block for block in blocks if f"{name}.".startswith(f"{block}.")), None)


def selected_blocks(blocks: Iterable[str], config: Any) -> list[str]:
    """Return the blocks that `layers_to_transform` and `layers_pattern` of a configuration select.

    Raises:
        ValueError: If there are blocks, but none of them is selected.
    """
    blocks, indices, patterns = list(blocks), config.layers_to_transform, config.layers_pattern
    indices = [indices] if isinstance(indices, int) else indices
    patterns = [patterns] if isinstance(patterns, str) else patterns
    selected = [
        block
        for block in blocks
        if not indices or (_index(block) in indices and (not patterns or block.split(".")[-2] in patterns))
    ]
    if blocks and not selected:
        raise ValueError(
            f"`layers_to_transform={indices}` with `layers_pattern={patterns}` leaves none of the model's "
            f"{len(blocks)} blocks, which are {blocks[0]!r} to {blocks[-1]!r}"
        )
    return selected


def _index(block: str) -> int | None:
    index = block.rpartition(".")[2]
    return int(index) if index.isdigit() else None


def _is_list_of_blocks(name: str, module: nn.Module) -> bool:
    children = list(module.children())
    if not children or any(isinstance(c, BaseTunerLayer) or next(c.children(), None) is None for c in children):
        return False
    if name.rpartition(".")[2] in _USUAL_NAMES and isinstance(module, (nn.ModuleList, nn.Sequential)):
        return True
    return isinstance(module, nn.ModuleList) and len({type(child) for child in children}) == 1
