"""Gradient masks: the entries of a gradient that are kept, and the factor that they are multiplied by.

GradDrop (arXiv 2307.10098, section III): `θ ← θ − α · g ⊙ m`. A mask is drawn from a stream of its own
([`stream_key`]), so it can be drawn again whenever it is needed, and no checkpoint has to hold it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from .streams import DRAWS, Key, draw_in_parts, single_draw, stream_key, stretches


class GradientMask:
    """The mask of one parameter's gradient in one step, which is drawn when it is applied.

    An entry is kept if its draw lies in [low, high), and is then multiplied by `factor`; with `noise` every entry is
    multiplied by `factor (1 + noise · ε)`, ε standard normal.

    Args:
        factor: Factor of the entries that are kept; 0 keeps nothing.
        key: Stream of the draws; None keeps all entries.
        low: Smallest draw that is kept, in [0, DRAWS].
        high: One above the largest draw that is kept.
        noise: Standard deviation of the Gaussian noise; 0 for none.

    Attributes:
        is_remembered: True to remember the entries that are kept once they are drawn, in a byte each, for a mask that
            is used many times.
    """

    def __init__(
        self, factor: float = 1.0, key: Key | None = None, low: int = 0, high: int = DRAWS, noise: float = 0.0
    ) -> None:
        self.is_remembered = False
        self._remembered: torch.Tensor | None = None
        whole = not noise and low <= 0 and high >= DRAWS
        self.factor = 0.0 if low >= high else factor
        self.key = None if whole or not self.factor else key
        self.low, self.high, self.noise = low, high, noise

    @property
    def keeps_nothing(self) -> bool:
        """True if the parameter does not change in this step."""
        return self.factor == 0

    @property
    def chooses(self) -> bool:
        """True if the mask keeps some entries and drops others."""
        return self.key is not None and not self.noise

    @property
    def share(self) -> float:
        """Expected share of the entries that are kept."""
        if self.keeps_nothing or not self.chooses:
            return float(not self.keeps_nothing)
        return (min(self.high, DRAWS) - max(self.low, 0)) / DRAWS

    def keep(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Return a bool tensor of the given shape, True where an entry is kept."""
        kept = torch.full(shape, not self.keeps_nothing, dtype=torch.bool, device=device)
        if self.chooses:
            for part, bits in self._kept_parts(kept):
                part.copy_(bits)
        return kept

    def apply_(self, gradient: torch.Tensor) -> torch.Tensor:
        """Mask a contiguous gradient of any shape in place, and return it. Dropped entries become 0, even if NaN."""
        if self.keeps_nothing:
            return gradient.zero_()
        if self.noise:
            assert self.key is not None
            for part, drawn in draw_in_parts(self.key, gradient):
                part *= self._noise_of(drawn)
            return gradient
        if self.chooses:
            for part, bits in self._kept_parts(gradient):
                _clear(part, bits)
        if self.factor != 1:
            gradient *= self.factor
        return gradient

    def restore_(self, parameter: torch.Tensor, before: torch.Tensor) -> None:
        """Set every entry of `parameter` that is not kept to its value in `before`, which has the same shape."""
        if self.keeps_nothing:
            parameter.copy_(before)
        elif not parameter.is_contiguous():
            parameter.copy_(torch.where(self.keep(parameter.shape, parameter.device), parameter, before))
        elif self.chooses:
            for part, old, bits in self._kept_parts(parameter, before):
                _restore(part, old, bits)

    def _kept_parts(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield flat views of the same part of each tensor, and last the bits of the entries that are kept.

        The tensors are contiguous and have one shape. The bits are int32: all set where an entry is kept, else none.
        """
        assert self.key is not None
        if self._remembered is not None and self._remembered.device == tensors[0].device:
            for start, stop in stretches(tensors[0].numel(), tensors[0].device):
                yield *(one.view(-1)[start:stop] for one in tensors), self._remembered[start:stop].int()
        elif self.is_remembered:
            remembered = torch.empty(tensors[0].numel(), dtype=torch.int8, device=tensors[0].device)
            for *parts, memory, drawn in draw_in_parts(self.key, *tensors, remembered):
                yield *parts, memory.copy_(self._kept_bits(drawn)).int()
            self._remembered = remembered
        else:
            for *parts, drawn in draw_in_parts(self.key, *tensors):
                yield *parts, self._kept_bits(drawn)

    def _kept_bits(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return int32 with all bits set where a draw is kept, else 0; bit operations are faster than comparisons."""
        halved = drawn >> 1  # so that differences fit into 32 bits
        low, high = (self.low - DRAWS // 2) << 15, (self.high - DRAWS // 2) << 15
        from_low = (low - 1 - halved) >> 31
        return from_low if self.high >= DRAWS else from_low & ((halved - high) >> 31)

    def _noise_of(self, drawn: torch.Tensor) -> torch.Tensor:
        noise = normal_table(drawn.device)[(drawn >> 16) + DRAWS // 2]
        return noise.mul_(self.noise).add_(1.0).mul_(self.factor)


def _clear(part: torch.Tensor, kept_bits: torch.Tensor) -> None:
    """Set entries that are not kept to zero; float32 is treated as bits, which takes a third of the time."""
    if part.dtype == torch.float32:
        part.view(torch.int32).bitwise_and_(kept_bits)
    else:
        part.masked_fill_(kept_bits == 0, 0)


def _restore(part: torch.Tensor, old: torch.Tensor, kept_bits: torch.Tensor) -> None:
    """Set entries that are not kept to their value in `old`."""
    if part.dtype == torch.float32:
        bits, old_bits = part.view(torch.int32), old.view(torch.int32)
        bits.bitwise_xor_(old_bits).bitwise_and_(kept_bits).bitwise_xor_(old_bits)
    else:
        part.copy_(torch.where(kept_bits == 0, old, part))


def bernoulli_mask(key: Key, rate: float, scale: bool) -> GradientMask:
    """Return a mask that drops each entry with probability `rate`, in steps of 1/65536 (section III.A, equation 4).

    Args:
        key: Stream of the draws.
        rate: Share of entries to drop, in [0, 1).
        scale: Multiply entries that are kept by 1 / (1 − rate), so that the gradient keeps its expectation.
    """
    dropped = min(round(rate * DRAWS), DRAWS - 1)
    return GradientMask(DRAWS / (DRAWS - dropped) if scale else 1.0, key, low=dropped)


def gaussian_mask(key: Key, rate: float) -> GradientMask:
    """Return a mask that multiplies each entry by Gaussian noise of mean 1 and variance rate / (1 − rate).

    These are the mean and the variance of a scaled Bernoulli mask.

    Args:
        key: Stream of the draws.
        rate: Share of entries that the Bernoulli mask would drop, in [0, 1).
    """
    return GradientMask(1.0, key, noise=(rate / (1 - rate)) ** 0.5)


def set_mask(key: Key, first: int, last: int, num_sets: int) -> GradientMask:
    """Return a mask that keeps the entries of the sets `first` to `last` of a random partition into `num_sets`.

    With one `key` every entry is in exactly one set: sampling without replacement over epochs (section III.B).
    """
    return GradientMask(1.0, key, -(-first * DRAWS // num_sets), -(-(last + 1) * DRAWS // num_sets))


def bernoulli_block_mask(key: Key, rate: float, scale: bool) -> GradientMask:
    """Return a mask with one Bernoulli draw for all entries of a transformer block.

    Args:
        key: Stream of the draw.
        rate: Probability to drop the block, in [0, 1).
        scale: Multiply a block that is kept by 1 / (1 − rate), so that the gradient keeps its expectation.
    """
    mask = bernoulli_mask(key, rate, scale)
    return GradientMask(mask.factor if single_draw(key) >= mask.low else 0.0)


def gaussian_block_mask(key: Key, rate: float) -> GradientMask:
    """Return a mask that multiplies all entries of a transformer block by one Gaussian draw.

    Args:
        key: Stream of the draw.
        rate: The noise has mean 1 and variance rate / (1 − rate); in [0, 1).
    """
    epsilon = normal_table(torch.device("cpu"))[single_draw(key)].item()
    return GradientMask(1.0 + gaussian_mask(key, rate).noise * epsilon)


def block_sets(
    num_blocks: int, num_sets: int, selection: str, seed: int, blocks_per_set: int | None = None
) -> list[int]:
    """Divide transformer blocks into sets, of sizes as equal as possible or of a given size.

    Args:
        num_blocks: Number of blocks, counted from the input.
        num_sets: Number of sets, one for each epoch.
        selection: `"top-down"` puts the blocks next to the output into set 0, `"bottom-up"` those next to the input;
            `"without-replacement"` divides them in a random order.
        seed: Seed of the random order.
        blocks_per_set: Number of blocks in a set, whatever `num_sets`; None for all blocks in `num_sets` even parts.

    Returns:
        The set number of each block, from the input on; with `blocks_per_set` it may be `num_sets` or more.
    """
    order = list(range(num_blocks))
    if selection == "top-down":
        order.reverse()
    elif selection == "without-replacement":
        order.sort(key=lambda block: stream_key(seed, "order of layers", block))
    if blocks_per_set is not None:
        return [order.index(block) // blocks_per_set for block in range(num_blocks)]
    return [order.index(block) * num_sets // num_blocks for block in range(num_blocks)]


@functools.lru_cache(maxsize=8)
def normal_table(device: torch.device) -> torch.Tensor:
    """Return the standard normal quantile of each draw: float32, shape (DRAWS,), mean 0, variance 1.

    They are computed on the CPU in float64, so that every device multiplies by the same numbers.
    """
    quantiles = torch.special.ndtri((torch.arange(DRAWS, dtype=torch.float64, device="cpu") + 0.5) / DRAWS)
    return (quantiles / quantiles.square().mean().sqrt()).float().to(device)
