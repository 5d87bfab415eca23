"""The stored form of a support, about as small as any exact one can be and of a size that k alone determines.

A support of k of n entries is a bit mask of n bits or, where that is smaller, its positions in the code of Elias and
Fano: of each position the lowest b bits as they are, and of the rest a bit mask in which the i-th position p sets bit
`(p >> b) + i`. Together these are about `k (b + 1) + n / 2^b` bits. A bit that flips in a mask changes the number of
positions, and in the code it may not, so a check of four bytes follows the code.
"""

from __future__ import annotations

import torch

_CHECK_BYTES = 4


def packed_support_size(num_entries: int, k: int) -> int:
    """Return the number of bytes of a packed support of `k` of `num_entries` entries."""
    return _num_bytes(_low_bits(num_entries, k), num_entries, k)


def pack_support(indices: torch.Tensor, num_entries: int) -> torch.Tensor:
    """Return sorted flat indices (k,) packed as bytes, uint8, lowest bit first; `unpack_support` is the inverse."""
    k, indices = indices.numel(), indices.long()
    low = _low_bits(num_entries, k)
    if low is None:
        return _bytes(_mask(indices, num_entries))
    parts = indices.unsqueeze(1) >> torch.arange(low, device=indices.device) & 1
    high = _mask((indices >> low) + _count(k, indices), _num_high_bits(low, num_entries, k))
    return torch.cat([_bytes(torch.cat([parts.flatten().to(torch.uint8), high])), _check(indices)])


def unpack_support(packed: torch.Tensor, num_entries: int, k: int) -> torch.Tensor:
    """Return the indices that `pack_support` packed, after checking that the packed tensor is not damaged.

    Args:
        packed: A packed support, or one in an older form: a bit mask (uint8) or flat indices (int32).
        num_entries: Number of entries of the core.
        k: Number of entries that the support must have.

    Returns:
        Sorted flat indices, int64, shape (k,), on the device of `packed`.

    Raises:
        ValueError: If dtype or size are wrong, or entries are missing, duplicated, unsorted or out of range.
    """
    size = packed_support_size(num_entries, k)
    if not is_older_form(packed, num_entries, k) and (packed.dtype != torch.uint8 or packed.shape != (size,)):
        raise ValueError(
            f"a support of {k} of {num_entries} entries is stored as torch.uint8 of shape ({size},), "
            f"not as {packed.dtype} of shape {tuple(packed.shape)}"
        )
    indices = packed.long() if packed.dtype == torch.int32 else _unpacked(packed, num_entries, k)
    if indices.numel() != k:
        raise ValueError(f"the support has {indices.numel()} entries, not {k}")
    if indices.numel() and (indices[0] < 0 or indices[-1] >= num_entries or (indices.diff() <= 0).any()):
        raise ValueError(f"the support's indices must be sorted, unique and within [0, {num_entries})")
    if _is_coded(packed, num_entries, k) and not torch.equal(packed[-_CHECK_BYTES:], _check(indices)):
        raise ValueError("the support's indices are not those that were packed")
    return indices


def is_older_form(packed: torch.Tensor, num_entries: int, k: int) -> bool:
    """Return whether a packed support has the dtype and shape of a form that files had, and that is no longer written.

    They were a bit mask, here one that is larger than the code of Elias and Fano, and int32 indices.
    """
    if packed.dtype == torch.int32:
        return packed.shape == (k,)
    mask_bytes = -(-num_entries // 8)
    return packed.dtype == torch.uint8 and packed.shape == (mask_bytes,) != (packed_support_size(num_entries, k),)


def _low_bits(num_entries: int, k: int) -> int | None:
    """Return b, or None if a bit mask is no larger."""
    low = min(range(num_entries.bit_length() + 1), key=lambda low: _num_bytes(low, num_entries, k))
    return low if _num_bytes(low, num_entries, k) < _num_bytes(None, num_entries, k) else None


def _num_bytes(low: int | None, num_entries: int, k: int) -> int:
    if low is None:
        return -(-num_entries // 8)
    return -(-(k * low + _num_high_bits(low, num_entries, k)) // 8) + _CHECK_BYTES


def _num_high_bits(low: int, num_entries: int, k: int) -> int:
    return k + ((num_entries - 1) >> low)


def _is_coded(packed: torch.Tensor, num_entries: int, k: int) -> bool:
    """Return whether a packed support is in the code of Elias and Fano."""
    return not is_older_form(packed, num_entries, k) and _low_bits(num_entries, k) is not None


def _unpacked(packed: torch.Tensor, num_entries: int, k: int) -> torch.Tensor:
    """Return the positions that are packed as bits, int64, without a check of how many they are."""
    if not _is_coded(packed, num_entries, k):
        return _bits(packed).nonzero().flatten()
    bits, low = _bits(packed[:-_CHECK_BYTES]), _low_bits(num_entries, k) or 0
    parts, high = bits[: k * low].view(k, low), bits[k * low :].nonzero().flatten()
    if len(high) != k:
        return high
    weights = 1 << torch.arange(low, device=packed.device)
    return (high - _count(k, high) << low) + (parts * weights).sum(1)


def _check(indices: torch.Tensor) -> torch.Tensor:
    """Return a weighted sum of the positions, modulo 2^32, as four bytes, which any one bit of the code changes."""
    total = (indices * (2 * _count(len(indices), indices) + 1)).sum()
    return (total >> torch.arange(0, 8 * _CHECK_BYTES, 8, device=indices.device) & 255).to(torch.uint8)


def _count(k: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(k, device=like.device)


def _mask(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Return `size` bits as uint8 with ones at the positions."""
    return torch.zeros(size, dtype=torch.uint8, device=positions.device).index_fill_(0, positions, 1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    return (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).flatten()


def _bytes(bits: torch.Tensor) -> torch.Tensor:
    """Return bits, uint8, packed as bytes, with zeros after the last."""
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)
