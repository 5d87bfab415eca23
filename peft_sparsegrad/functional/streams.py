"""Random numbers as a pure function of a key and a position: no generator, no state, the same on every device.

Counter-based generators (Salmon et al. 2011, *Parallel Random Numbers: As Easy as 1, 2, 3*) hash the position instead
of stepping through a state. Integer arithmetic alone is used, so a CPU and a GPU agree bit for bit, any rank draws
what the others draw, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

DRAWS = 1 << 16
"""Number of values that a draw can take."""

# Shifts and factors of Wellons' integer hash "triple32", as signed numbers: torch has no unsigned products. Its
# relative with two rounds left correlations of 0.004 between the rows of a matrix of width 768.
_ROUNDS = ((17, 0xED5AD4BB - (1 << 32)), (11, 0xAC4C1B51 - (1 << 32)), (15, 0x31848BAB), (14, 1))

_CHUNK = 1 << 17  # words that stay in a CPU core's cache between the operations on them
_CHUNK_ELSEWHERE = 1 << 24  # few enough to need little memory, many enough to keep a GPU busy


class Key(NamedTuple):
    """The name of a stream: two signed 32-bit numbers."""

    first: int
    second: int


def stream_key(*parts: int | str) -> Key:
    """Return the key that belongs to `parts`, for example a seed, a step and the name of a parameter."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return Key(*(int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:])))


def single_draw(key: Key) -> int:
    """Return one number in [0, DRAWS), the only draw that a stream of one entry needs."""
    return key.first % DRAWS


def words(key: Key, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return words number `start` to `stop` of a stream: int32, shape (stop - start,), uniform on all 32 bits."""
    mixed = _positions(stop - start, device) + _signed(start + key.first)
    scratch = torch.empty_like(mixed)
    for number, (shift, factor) in enumerate(_ROUNDS):
        torch.bitwise_right_shift(mixed, shift, out=scratch)
        scratch &= (1 << (32 - shift)) - 1  # the shift copies the sign bit
        mixed ^= scratch
        if factor != 1:
            mixed *= factor
        if number == 0:
            mixed += key.second
    return mixed


def stretches(count: int, device: torch.device) -> list[tuple[int, int]]:
    """Return the stretches (start, stop) of `count` words to work on at a time: cache-sized on a CPU, else larger."""
    size = _CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def draw_in_parts(key: Key, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield a draw for each entry of a tensor.

    Every word serves two entries: its lower half one in the first half of the tensor, its upper half one in the
    second half. In this order nothing has to be interleaved.

    Args:
        key: The stream.
        tensors: Contiguous tensors, all of one shape.

    Yields:
        Flat views of the same part of each tensor, and last the draws of its entries: int32, uniform. The upper 16
        bits are the draw, as a signed number; the lower bits have no meaning.
    """
    flat = [tensor.view(-1) for tensor in tensors]
    count, device = flat[0].numel(), flat[0].device
    half = (count + 1) // 2
    for start, stop in stretches(half, device):
        drawn = words(key, start, stop, device)
        yield *(one[start:stop] for one in flat), drawn << 16
        last = min(half + stop, count)
        yield *(one[half + start : last] for one in flat), drawn[: last - half - start]


def draws(key: Key, count: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the draws of a tensor with `count` entries: int32, shape (count,), uniform on [-32768, 32767]."""
    drawn = torch.empty(count, dtype=torch.int32, device=device)
    for part, of_part in draw_in_parts(key, drawn):
        part.copy_(of_part >> 16)
    return drawn


def _positions(count: int, device: torch.device) -> torch.Tensor:
    return _chunk_of_positions(device)[:count] if count <= _CHUNK else _arange(count, device)


@functools.lru_cache(maxsize=8)
def _chunk_of_positions(device: torch.device) -> torch.Tensor:
    return _arange(_CHUNK, device)


def _arange(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _signed(number: int) -> int:
    """Return the signed 32-bit number that is congruent to `number` modulo 2³²."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
