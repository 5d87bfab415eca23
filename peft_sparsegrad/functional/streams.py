"""Random numbers as a pure function of a key and a position: no generator, no state, the same on every device.

Counter-based generators (Salmon et al. 2011, *Parallel Random Numbers: As Easy as 1, 2, 3*) hash the position instead
of stepping through a state. Integer arithmetic alone is used, so a CPU and a GPU agree bit for bit, any rank draws
what the others draw, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

DRAWS = 1 << 16
"""Number of values that a draw can take."""

# Shifts and factors of Wellons' integer hash "triple32", as signed numbers: torch has no unsigned products. Its
# relative with two rounds left correlations of 0.004 between the rows of a matrix of width 768.
_ROUNDS = ((17, 0xED5AD4BB - (1 << 32)), (11, 0xAC4C1B51 - (1 << 32)), (15, 0x31848BAB), (14, 1))

_CHUNK = 1 << 17  # draws that stay in a CPU core's cache between the operations on them


class Key(NamedTuple):
    """Names a stream: two signed 32-bit numbers."""

    first: int
    second: int


def stream_key(*parts: int | str) -> Key:
    """The key that belongs to `parts`, for example a seed, a step and the name of a parameter."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return Key(*(int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:])))


def single_draw(key: Key) -> int:
    """One number in [0, DRAWS), for what needs no more than one."""
    return key.first % DRAWS


def draws(key: Key, start: int, stop: int, device: torch.device | None = None) -> torch.Tensor:
    """Draws number `start` to `stop` of a stream; `start` must be even.

    Returns:
        int16, shape (stop - start,), uniform on [-32768, 32767]: the draw less 32768, as torch compares int16 fastest.
    """
    words = torch.arange(start // 2, (stop + 1) // 2, dtype=torch.int32, device=device)
    words += key.first
    scratch = torch.empty_like(words)
    for number, (shift, factor) in enumerate(_ROUNDS):
        _mix(words, scratch, shift, factor)
        if number == 0:
            words += key.second
    return words.view(torch.int16)[: stop - start]


def _mix(words: torch.Tensor, scratch: torch.Tensor, shift: int, factor: int) -> None:
    """In place, `words = (words ^ (words >>> shift)) * factor`, all modulo 2³²."""
    torch.bitwise_right_shift(words, shift, out=scratch)
    scratch &= (1 << (32 - shift)) - 1  # the shift copies the sign bit
    words ^= scratch
    if factor != 1:
        words *= factor


def chunks(count: int, device: torch.device) -> list[tuple[int, int]]:
    """Stretches (start, stop) of `count` draws to work on at a time: cache-sized on a CPU, all at once elsewhere."""
    size = _CHUNK if device.type == "cpu" else max(count, 1)
    return [(start, min(start + size, count)) for start in range(0, count, size)]
