import itertools
import math

import pytest
import torch
from scipy import stats

from peft_sparsegrad.functional import streams
from peft_sparsegrad.functional.streams import DRAWS, Key, draws, single_draw, stream_key, stretches, words

KEYS = [stream_key(seed, "layer.weight", step) for seed, step in [(0, 0), (0, 1), (7, 100)]]
EDGE_KEYS = [Key(0, 0), Key(-1, 1), Key(2**31 - 1, -(2**31)), Key(-(2**31), 2**31 - 1), Key(2**31 - 3, 2**31 - 1)]
CPU = torch.device("cpu")
GOLDEN = [7365, 28649, -20648, -30722, 29940, 28063, -23608, -17459]
SURPRISE = 1e-4  # p-value at which a statistic of the fixed keys counts as wrong


def literal_word(key: Key, number: int) -> int:
    """The stream's definition, in integers modulo 2³²."""
    modulus = 2**32
    word = (number + key.first) % modulus
    word ^= word >> 17
    word = word * 0xED5AD4BB % modulus
    word = (word + key.second) % modulus
    word ^= word >> 11
    word = word * 0xAC4C1B51 % modulus
    word ^= word >> 15
    word = word * 0x31848BAB % modulus
    word ^= word >> 14
    return word


def literal_draw(key: Key, number: int, count: int) -> int:
    """Draw `number` of a tensor with `count` entries, whose second half uses the upper halves of the words."""
    first = (count + 1) // 2
    half = literal_word(key, number) & 0xFFFF if number < first else literal_word(key, number - first) >> 16
    return half - DRAWS if half >= DRAWS // 2 else half


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def unsigned(key: Key, count: int) -> torch.Tensor:
    return draws(key, count) + DRAWS // 2


@pytest.mark.parametrize("key", EDGE_KEYS + KEYS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 998, 999])
def test_draws_are_those_of_the_literal_hash(key, count):
    assert draws(key, count).tolist() == [literal_draw(key, number, count) for number in range(count)]


@pytest.mark.parametrize("count", [4 * streams._CHUNK, 4 * streams._CHUNK + 5])
def test_draws_on_the_borders_of_chunks(count):
    drawn = draws(KEYS[0], count)
    for border in (0, streams._CHUNK, (count + 1) // 2, (count + 1) // 2 + streams._CHUNK, count):
        for number in range(max(border - 3, 0), min(border + 3, count)):
            assert drawn[number] == literal_draw(KEYS[0], number, count)


@pytest.mark.parametrize("start", [0, 1, streams._CHUNK - 2, 2**31 - 6, 2**31 - 4])
def test_words_from_anywhere(start):
    for key in EDGE_KEYS:
        assert words(key, start, start + 9, CPU).tolist() == [signed(literal_word(key, start + i)) for i in range(9)]


def test_draws_are_int32():
    assert draws(KEYS[0], 7).dtype == torch.int32
    assert draws(KEYS[0], 7).shape == (7,)


def test_values_of_a_release():
    """A change here changes every user's masks."""
    assert stream_key(0, "a", 1) == Key(-850358743, -585611712)
    assert draws(stream_key(0, "a", 1), 8).tolist() == GOLDEN
    assert single_draw(stream_key(0, "a", 1)) == 36393


def test_the_global_random_state_is_untouched():
    before = torch.get_rng_state()
    draws(stream_key(3, "x"), 1000)
    single_draw(stream_key(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_drawing_again_gives_the_same_and_new_memory():
    first = draws(KEYS[0], 100)
    again = draws(KEYS[0], 100)
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()


PARTS = [(), ("a", 1), ("a1",), ("a", "1"), (1, "a"), ("a", 2), ("b", 1), ("a", 1, 0), ("a", -1), (0, "a", 1), ("a",)]
PARTS += [("a'", 1), ("a', 1",), (11, 1), (1, 11), (111,), (2**40, 1), (2**40 + 1, 1), ("A", 1), ("a ", 1), ("é", 1)]


def test_keys_differ_when_any_part_does():
    keys = [stream_key(*parts) for parts in PARTS]
    assert len(set(keys)) == len(PARTS)
    assert len({key.first for key in keys}) == len(PARTS)
    assert len({key.second for key in keys}) == len(PARTS)


def test_keys_are_signed_32_bit_numbers_of_either_sign():
    halves = [half for step in range(2000) for half in stream_key(0, "w", step)]
    assert -(2**31) <= min(halves) < -0.99 * 2**31
    assert 0.99 * 2**31 < max(halves) < 2**31


def test_key_halves_are_independent():
    keys = torch.tensor([stream_key(0, "w", step) for step in range(4000)], dtype=torch.float64)
    assert abs(torch.corrcoef(keys.T)[0, 1]) < 4 / math.sqrt(4000)


def test_single_draw_is_uniform():
    numbers = torch.tensor([single_draw(stream_key(seed, "w", step)) for seed in range(4) for step in range(5000)])
    assert numbers.min() >= 0
    assert numbers.max() < DRAWS
    for bins in (numbers // 1024, numbers % 64):  # the highest six bits and the lowest six
        assert stats.chisquare(torch.bincount(bins, minlength=64).numpy()).pvalue > SURPRISE


def test_stretches_cover_everything_once():
    size = streams._CHUNK
    assert stretches(0, CPU) == []
    assert stretches(1, CPU) == [(0, 1)]
    assert stretches(size, CPU) == [(0, size)]
    assert stretches(2 * size + 3, CPU) == [(0, size), (size, 2 * size), (2 * size, 2 * size + 3)]


def test_stretches_are_longer_elsewhere_than_on_a_cpu():
    size = 1 << 24
    assert stretches(10**7 + 1, torch.device("cuda")) == [(0, 10**7 + 1)]
    assert stretches(size + 1, torch.device("cuda")) == [(0, size), (size, size + 1)]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_chunk_size_does_not_matter(monkeypatch, size):
    expected = draws(KEYS[0], 1001)
    monkeypatch.setattr(streams, "_CHUNK", size)
    assert stretches(1001, CPU)[0] == (0, size)
    assert torch.equal(draws(KEYS[0], 1001), expected)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("part", [slice(None), slice(1 << 20), slice(1 << 20, None)], ids=["all", "low", "high"])
def test_every_value_is_equally_likely(key, part):
    values = unsigned(key, 1 << 21)[part]
    p = stats.chisquare(torch.bincount(values, minlength=DRAWS).numpy()).pvalue
    assert SURPRISE < p < 1 - SURPRISE


@pytest.mark.parametrize("key", KEYS)
def test_every_bit_is_balanced(key):
    values = unsigned(key, 1 << 18)
    for half, bit in itertools.product((0, 1), range(16)):
        ones = (values.view(2, -1)[half] >> bit & 1).sum().item()
        assert stats.binomtest(ones, 1 << 17).pvalue > SURPRISE, (half, bit)


NUMBER = 1 << 18


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([first, second]).double())[0, 1].item()


def correlations(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Of two lists of draws, and of what masks of three rates make of them."""
    return [correlation(first, second)] + [
        correlation(first < rate * DRAWS, second < rate * DRAWS) for rate in (0.1, 0.5, 0.9)
    ]


def joint_tables(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """Counts of the high or low four bits of one with those of the other, shape (256,)."""
    parts = (lambda values: values >> 12, lambda values: values & 15)
    return [
        torch.bincount(of_first(first) * 16 + of_second(second), minlength=256)
        for of_first, of_second in itertools.product(parts, repeat=2)
    ]


def assert_independent(first: torch.Tensor, second: torch.Tensor) -> None:
    """No sign in all these draws that they are not independent and uniform."""
    assert max(map(abs, correlations(first, second))) < 4.5 / math.sqrt(first.numel())
    for table in joint_tables(first, second):
        assert stats.chisquare(table.numpy()).pvalue > SURPRISE
    for rate in (0.1, 0.5, 0.9):
        fates = torch.bincount((first < rate * DRAWS) * 2 + (second < rate * DRAWS), minlength=4).view(2, 2)
        assert stats.chi2_contingency(fates.numpy(), correction=False).pvalue > SURPRISE


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 6, 64, 768, 1024, 4096])
def test_entries_at_a_distance_are_independent(key, lag):
    """Two rounds of hashing left correlations of a few thousandths at some distances, for example 768."""
    values = unsigned(key, 2 * (NUMBER + lag)).view(2, -1)
    for half in values:
        assert_independent(half[:-lag], half[lag:])


@pytest.mark.parametrize("key", KEYS)
def test_the_halves_of_a_word_are_independent(key):
    values = unsigned(key, 2 * NUMBER)
    assert_independent(*values.view(2, -1))


@pytest.mark.parametrize("step", [0, 1, 2, 1000])
def test_consecutive_steps_are_independent(step):
    assert_independent(*(unsigned(stream_key(0, "layer.weight", s), NUMBER) for s in (step, step + 1)))


@pytest.mark.parametrize("names", [("layers.0.q", "layers.1.q"), ("layers.0.q", "layers.0.k"), ("w", "w.bias")])
def test_parameters_are_independent(names):
    assert_independent(*(unsigned(stream_key(0, name, 0), NUMBER) for name in names))


def test_seeds_are_independent():
    assert_independent(*(unsigned(stream_key(seed, "w", 0), NUMBER) for seed in (0, 1)))


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_every_two_of_many_steps_are_uncorrelated(rate):
    steps, entries = 50, 1 << 15
    dropped = torch.stack([unsigned(stream_key(0, "w", step), entries) for step in range(steps)]) < rate * DRAWS
    pairs = torch.triu_indices(steps, steps, 1)
    normal = torch.corrcoef(dropped.float())[pairs[0], pairs[1]] * math.sqrt(entries)
    assert normal.abs().max() < 5
    assert abs(normal.square().mean() - 1) < 5 * math.sqrt(2 / normal.numel())


def test_both_halves_of_the_key_matter():
    streams_of = [draws(key, 64).tolist() for key in (Key(5, 7), Key(6, 7), Key(5, 8))]
    assert all(a != b for a, b in itertools.combinations(streams_of, 2))


def test_many_streams_at_one_position_are_uniform_and_independent_of_the_next_position():
    pairs = torch.stack([unsigned(stream_key(0, "w", step), 2) for step in range(6000)])
    joint = torch.bincount((pairs[:, 0] >> 13) * 8 + (pairs[:, 1] >> 13), minlength=64)
    assert stats.chisquare(joint.numpy()).pvalue > SURPRISE


def test_the_number_of_small_draws_varies_between_streams_as_a_binomial_does():
    streams_, entries, rate = 1000, 512, 0.25
    counts = [(unsigned(stream_key(1, "w", s), entries) < rate * DRAWS).sum().item() for s in range(streams_)]
    dispersion = sum((count - rate * entries) ** 2 for count in counts) / (entries * rate * (1 - rate))
    assert SURPRISE < stats.chi2(streams_).sf(dispersion) < 1 - SURPRISE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("key", EDGE_KEYS + KEYS)
def test_a_gpu_draws_what_a_cpu_draws(key):
    for count in (0, 1, 2, 301_001):
        assert torch.equal(draws(key, count, torch.device("cuda")).cpu(), draws(key, count))
