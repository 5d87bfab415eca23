"""The sampler of gradient masks, which depend on the settings and on the progress of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..functional import (
    SCHEDULES,
    GradientMask,
    bernoulli_block_mask,
    bernoulli_mask,
    block_sets,
    gaussian_block_mask,
    gaussian_mask,
    set_mask,
    stream_key,
)
from .config import GradDropConfig
from .step_progress import StepProgress


class MaskSampler:
    """Sampler of the gradient masks of all parameters that one configuration governs.

    A mask is a function of the seed, the step or epoch, and the parameter's name, so a checkpoint has to hold no more
    than the number of steps.

    Args:
        config: The GradDrop settings.
        blocks: Names of the transformer blocks that the settings govern, from the input on.

    Attributes:
        progress: Optimizer steps of the run, and the one that the running passes belong to.
        epoch: Number of the epoch, from 0; None until it is announced.
        num_epochs: Number of epochs of the run; None until it is known.
    """

    def __init__(self, config: GradDropConfig, blocks: Sequence[str]) -> None:
        self.config, self.blocks = config, list(blocks)
        self.progress = StepProgress(holds=config.frozen == "hold")
        self._sets: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything that was announced; the steps taken remain."""
        self.progress.reset()
        self.epoch: int | None = None
        self.num_epochs: int | None = None
        self._nothing_trains: dict[tuple[int, int | None], bool] = {}
        self._masks_of_epoch: tuple[int | None, dict[str, GradientMask]] = (None, {})
        if self.config.num_epochs is not None:
            self.set_num_epochs(self.config.num_epochs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_masks_of_epoch": (None, {})}

    def set_num_epochs(self, num_epochs: int) -> None:
        """Announce the number of epochs of the run.

        Raises:
            ValueError: If the configuration names another number, or its settings do not allow this one.
        """
        config = self.config
        if config.num_epochs not in (None, num_epochs):
            raise ValueError(
                f"`num_epochs` is {config.num_epochs} in the GradDrop configuration, but the number of epochs of the "
                f"run is {num_epochs}: make them the same, or leave `num_epochs` None"
            )
        config.check_num_epochs(num_epochs)
        if config.toggle and config.granularity == "layer":
            self._check_toggle(num_epochs)
        self.num_epochs, self._masks_of_epoch = num_epochs, (None, {})
        if config.uses_sets and config.granularity == "layer":
            sets = block_sets(len(self.blocks), num_epochs, config.selection, config.seed, config.blocks_per_epoch)
            self._sets = dict(zip(self.blocks, sets, strict=True))

    def _check_toggle(self, num_epochs: int) -> None:
        """Raise a ValueError if the blocks, each in one epoch alone, do not last for so many epochs."""
        blocks, at_once = len(self.blocks), self.config.blocks_per_epoch
        if num_epochs > -(-blocks // (at_once or 1)):
            each = "" if at_once is None else f", {at_once} an epoch,"
            raise ValueError(
                f"`toggle` with {num_epochs} epochs and {blocks} blocks{each} would train no block at all in some "
                f"epochs: use {'at most as many epochs as blocks' if at_once is None else 'fewer epochs'}"
            )

    def set_epoch(self, epoch: int) -> None:
        """Announce an epoch, counted from 0.

        Raises:
            ValueError: If the number of epochs is needed but not known, or `epoch` is not below it.
        """
        if self.config.needs_num_epochs:
            if self.num_epochs is None:
                raise ValueError(
                    "`num_epochs` is not known: set it in the configuration, or call `GradDrop(model, num_epochs=3)`"
                )
            if not 0 <= epoch < self.num_epochs:
                raise ValueError(f"`epoch` must be in [0, {self.num_epochs}), as `num_epochs` says, not {epoch}")
        self.epoch = epoch

    @property
    def is_announced(self) -> bool:
        """True once everything that a mask depends on is known."""
        return self.epoch is not None or not self.config.needs_epoch

    @property
    def rate(self) -> float:
        """Share of entries or blocks that are dropped now, by the schedule or because their set is frozen."""
        if not self.config.uses_sets:
            epoch, num_epochs = self.epoch or 0, self.num_epochs or 1
            return SCHEDULES[self.config.schedule](self.config.p, epoch, num_epochs)
        first, last, num_epochs = self._active_sets()
        if self.config.blocks_per_epoch is not None:
            return sum(not first <= number <= last for number in self._sets.values()) / len(self._sets)
        return 1 - (last - first + 1) / num_epochs

    def mask(self, name: str, block: str) -> GradientMask:
        """Return the mask of a parameter in this step.

        Args:
            name: Name of the parameter.
            block: Name of the parameter's transformer block.

        Raises:
            RuntimeError: If the epoch is needed but was never announced.
        """
        if not self.is_announced:
            raise RuntimeError(
                f"GradDrop with interval={self.config.interval!r} and schedule={self.config.schedule!r} depends on "
                "the epoch, and no epoch was announced: give the Trainer a `GradDropCallback`, or, in a training loop "
                "of your own, call `set_epoch(epoch)` of the `GradDrop` object (of an adapter: `GradDrop(model)`)"
            )
        if self.config.interval == "step" or self.config.granularity == "layer":
            return self._new_mask(name, block)
        if self._masks_of_epoch[0] != self.epoch:
            self._masks_of_epoch = (self.epoch, {})
        mask = self._masks_of_epoch[1].setdefault(name, self._new_mask(name, block))
        mask.is_remembered = True
        return mask

    def _new_mask(self, name: str, block: str) -> GradientMask:
        if self.config.uses_sets:
            return self._set_mask(name, block)
        return self._random_mask(name if self.config.granularity == "element" else block)

    def trains(self, name: str, block: str) -> bool:
        """Return whether any entry of the parameter may train in this step."""
        return not self.is_announced or not self.mask(name, block).keeps_nothing

    @property
    def nothing_trains(self) -> bool:
        """True if every block is dropped in this step."""
        if self.config.granularity == "element" or not self.is_announced:
            return False
        now = (self.progress.step, self.epoch)
        if now not in self._nothing_trains:
            self._nothing_trains = {now: all(self.mask("", block).keeps_nothing for block in self.blocks)}
        return self._nothing_trains[now]

    def _set_mask(self, name: str, block: str) -> GradientMask:
        first, last, num_epochs = self._active_sets()
        if self.config.granularity == "layer":
            return GradientMask(float(first <= self._sets[block] <= last))
        return set_mask(stream_key(self.config.seed, "sets", name), first, last, num_epochs)

    def _active_sets(self) -> tuple[int, int, int]:
        assert self.epoch is not None
        assert self.num_epochs is not None
        return (self.epoch if self.config.toggle else 0), self.epoch, self.num_epochs

    def _random_mask(self, unit: str) -> GradientMask:
        config = self.config
        now = self.epoch if config.interval == "epoch" else self.progress.step
        key = stream_key(config.seed, config.interval, now or 0, unit)
        if config.noise == "gaussian":
            gaussian = gaussian_mask if config.granularity == "element" else gaussian_block_mask
            return gaussian(key, self.rate)
        bernoulli = bernoulli_mask if config.granularity == "element" else bernoulli_block_mask
        return bernoulli(key, self.rate, bool(config.scale))

    def mask_gradient_(self, gradient: torch.Tensor, name: str, block: str) -> torch.Tensor:
        """Mask the contiguous gradient of the parameter `name` in `block` in place, and return it."""
        return self.mask(name, block).apply_(gradient)
