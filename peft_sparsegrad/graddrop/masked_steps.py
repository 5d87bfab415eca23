"""GradDrop's part in an optimizer's step: count the step, and hold masked entries where they are.

This makes masks advance and frozen entries stay in any training loop, without a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ..common.training.optimizer_watcher import OptimizerStep
from ..common.training.pieces import Piece
from ..functional import GradientMask
from .mask_sampler import MaskSampler


class MaskedParameter(NamedTuple):
    """A trained parameter, with the sampler, the name and the block on which its mask depends."""

    parameter: torch.nn.Parameter
    sampler: MaskSampler
    name: str
    block: str


class _Held(NamedTuple):
    parameter: torch.nn.Parameter
    piece: Piece
    mask: GradientMask
    before: torch.Tensor

    def restore(self, renewed: torch.Tensor | None) -> None:
        """Set every entry of the piece that is not kept to its value before the step.

        Args:
            renewed: Mask of the slots to which a renewal has given other entries after the step, whose value is 0.
        """
        piece = self.piece
        if renewed is not None:
            self.before.masked_fill_(renewed if piece.is_whole else piece.cut(renewed), 0.0)
        if piece.is_whole:
            self.mask.restore_(self.parameter, self.before)
            return
        kept = self.mask.keep(torch.Size([piece.size]), self.before.device)
        piece.values.copy_(torch.where(piece.cut(kept), piece.values, self.before))


def before_masked_step(parameters: Iterable[MaskedParameter], step: OptimizerStep) -> Callable[[], None] | None:
    """Prepare masked parameters for a step: drop fully masked gradients, and remember entries to be held.

    Returns:
        A function to call after the step, which restores the entries and counts the step; None if the optimizer holds
        none of the parameters, or there was no pass.

    Raises:
        RuntimeError: If the masks are bound to another run's optimizer, or entries are to be held from an optimizer
            that moves them outside of its steps, or something has moved them since the last step.
    """
    moved = [masked for masked in parameters if step.updates(masked.parameter)]
    for masked in moved:
        masked.sampler.progress.step_begins(masked.name, masked.parameter)
    updated = [masked for masked in moved if masked.sampler.progress.awaits_step(masked.name)]
    if not updated:
        return None
    held = [entries for masked in updated if (entries := _hold(masked, step)) is not None]

    def after_step() -> None:
        for entries in held:
            entries.restore(step.renewed.get(id(entries.parameter)))
        for masked in updated:
            masked.sampler.progress.step_taken(masked.name, masked.parameter)

    return after_step


def _hold(masked: MaskedParameter, step: OptimizerStep) -> _Held | None:
    parameter, sampler, name, block = masked
    sampler.progress.check_optimizer(step.optimizer)
    if sampler.config.frozen == "hold":
        _check_moves_in_steps(step.optimizer)
    piece = step.piece(parameter)
    if sampler.config.frozen != "hold" or (piece.gradient is None and not step.repeats_passes):
        return None
    mask = sampler.mask(name, block)
    if mask.keeps_nothing and not step.repeats_passes:  # a line search moves all parameters as one
        _check_can_be_skipped(parameter, piece)
        parameter.grad = None  # optimizers skip parameters without a gradient
        return None
    if not mask.keeps_nothing and not mask.chooses:
        return None
    return _Held(parameter, piece, mask, (parameter.detach() if piece.is_whole else piece.values).clone())


def _check_can_be_skipped(parameter: torch.nn.Parameter, piece: Piece) -> None:
    """Raise a RuntimeError if an optimizer cannot skip a parameter, because it holds DeepSpeed's flat tensor."""
    if piece.held is not parameter:
        raise RuntimeError(
            "GradDrop leaves the moments of a held layer as they are, and DeepSpeed ZeRO lets those of all layers "
            "decay in one flat tensor: set frozen='gradient', or use FSDP2"
        )


def _check_moves_in_steps(optimizer: torch.optim.Optimizer) -> None:
    """Raise a RuntimeError if an optimizer swaps the weights for an average of theirs, as schedule-free ones do."""
    if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        raise RuntimeError(
            f"{type(optimizer).__name__} swaps the weights for an average, which moves entries that GradDrop is to "
            "hold: set frozen='gradient', or use another optimizer"
        )
