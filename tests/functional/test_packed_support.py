"""Packed supports: exact, small, of a size that k determines, and never read when damaged."""

import math

import pytest
import torch

from peft_sparsegrad.functional import is_older_form, pack_support, packed_support_size, unpack_support

CODED, MASK = (1000, 7), (12, 7)  # (entries, k) on either side of the point where a bit mask is smaller
SIZES = [CODED, MASK, (100, 7), (8, 8), (1, 1), (13, 13), (10_000, 1), (10_000, 9_999), (257, 64), (5, 0), (0, 0)]


def random_support(num_entries: int, k: int) -> torch.Tensor:
    return torch.randperm(num_entries, generator=torch.Generator().manual_seed(0))[:k].sort().values


def slow_code(positions: list[int], num_entries: int, low: int) -> list[int]:
    """The code of Elias and Fano, bit by bit: lowest bits of each position, then the rest as a bit mask; a check."""
    bits = [position >> bit & 1 for position in positions for bit in range(low)]
    high = [0] * (len(positions) + ((num_entries - 1) >> low))
    for count, position in enumerate(positions):
        high[(position >> low) + count] = 1
    check = sum(position * (2 * count + 1) for count, position in enumerate(positions)) % 2**32
    return slow_bytes(bits + high) + list(check.to_bytes(4, "little"))


def slow_mask(positions: list[int], num_entries: int) -> list[int]:
    return [int(entry in set(positions)) for entry in range(num_entries)]


def slow_bytes(bits: list[int]) -> list[int]:
    bits = bits + [0] * (-len(bits) % 8)
    return [sum(bit << place for place, bit in enumerate(bits[start : start + 8])) for start in range(0, len(bits), 8)]


@pytest.mark.parametrize(("num_entries", "k"), SIZES)
def test_packed_support_is_the_smallest_of_the_slow_ones_and_exact(num_entries, k):
    indices = random_support(num_entries, k)
    codes = [slow_bytes(slow_mask(indices.tolist(), num_entries))]
    codes += [slow_code(indices.tolist(), num_entries, low) for low in range(20) if num_entries]
    packed = pack_support(indices, num_entries)
    assert packed.tolist() in codes
    assert len(packed) == packed_support_size(num_entries, k) == min(map(len, codes))
    unpacked = unpack_support(packed, num_entries, k)
    assert unpacked.dtype == torch.int64
    assert torch.equal(unpacked, indices)


@pytest.mark.parametrize("place", ["first", "last", "together"])
def test_positions_at_the_edges(place):
    num_entries, k = 1003, 40
    starts = {"first": torch.arange(k), "last": torch.arange(num_entries - k, num_entries)}
    indices = starts.get(place, torch.cat([torch.arange(k // 2), starts["last"][k // 2 :]]))
    assert torch.equal(unpack_support(pack_support(indices, num_entries), num_entries, k), indices)


@pytest.mark.parametrize("slack", [4, 12, 100, 5000])
def test_size_is_near_the_least_that_any_exact_code_can_have(slack):
    k, share = 10_000, 1 / slack
    least = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) * slack
    assert least < 8 * packed_support_size(slack * k, k) / k < least + 0.8


@pytest.mark.parametrize(("num_entries", "k"), [(100, 7), CODED, (4096, 300)])
def test_older_forms_are_read(num_entries, k):
    """Files of format 1 hold a bit mask or int32 indices, whichever was smaller."""
    indices = random_support(num_entries, k)
    mask = torch.tensor(slow_bytes(slow_mask(indices.tolist(), num_entries)), dtype=torch.uint8)
    for older in (mask, indices.int()):
        assert is_older_form(older, num_entries, k)
        assert torch.equal(unpack_support(older, num_entries, k), indices)
    assert not is_older_form(pack_support(indices, num_entries), num_entries, k)


def test_any_bit_that_flips_is_noticed():
    packed = pack_support(random_support(600, 50), 600)
    assert len(packed) < 600 / 8
    for number in range(8 * len(packed)):
        padding = 8 * (len(packed) - 4) - (50 * 3 + 50 + (599 >> 3))
        if not 0 <= 8 * (len(packed) - 4) - 1 - number < padding:
            with pytest.raises(ValueError, match=r"entries, not 50|sorted, unique|not those that were packed"):
                unpack_support(with_bit(packed, number), 600, 50)


GOOD = (1, 5, 20, 300, 400, 998, 999)


def packed_indices(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32)


def coded(*indices: int, num_entries: int = CODED[0]) -> torch.Tensor:
    return pack_support(torch.tensor(indices), num_entries)


def with_bit(packed: torch.Tensor, number: int) -> torch.Tensor:
    flipped = packed.clone()
    flipped[number // 8] ^= 1 << number % 8
    return flipped


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.tensor(GOOD), "stored as torch.uint8 of shape"),
        (torch.tensor(GOOD, dtype=torch.float32), "stored as torch.uint8 of shape"),
        (torch.zeros(124, dtype=torch.uint8), "stored as torch.uint8 of shape"),
        (coded(*GOOD)[:-1], "stored as torch.uint8 of shape"),
        (coded(*GOOD).to(torch.int8), "stored as torch.uint8 of shape"),
        (torch.zeros_like(coded(*GOOD)), "has 0 entries, not 7"),
        (with_bit(coded(*GOOD), 7 * 7), "has .* entries, not 7"),
        (coded(0, 1, 2, 3, 4, 5, 1010, num_entries=1015), "within"),
        (with_bit(coded(0, 1, 2, 3, 4, 5, 6), 0), "sorted, unique and within"),
        (with_bit(coded(*GOOD), 9), "not those that were packed"),
        (torch.zeros(125, dtype=torch.uint8), "has 0 entries, not 7"),
        (packed_indices(*GOOD[:-1]), "of 7 of 1000 entries"),
        (packed_indices(*GOOD).view(1, 7), "shape"),
        (packed_indices(1, 5, 20, 20, 400, 998, 999), "sorted, unique and within"),
        (packed_indices(5, 1, 20, 300, 400, 998, 999), "sorted, unique and within"),
        (packed_indices(-1, 5, 20, 300, 400, 998, 999), "sorted, unique and within"),
        (packed_indices(1, 5, 20, 300, 400, 998, 1000), "sorted, unique and within"),
        (packed_indices(1, 5, 20, 2**31 - 1, 400, 998, 999), "sorted, unique and within"),
    ],
)
def test_damaged_code_and_indices(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack_support(packed, *CODED)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ([0b00111111, 0], "has 6 entries, not 7"),
        ([0b11111111, 0], "has 8 entries, not 7"),
        ([0b00111111, 0b10000000], "within"),
        ([0b01111111], "stored as torch.uint8 of shape"),
    ],
)
def test_damaged_mask(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack_support(torch.tensor(packed, dtype=torch.uint8), *MASK)
