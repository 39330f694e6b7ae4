"""Laws of the computed permutation, and its values."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.permutation import ROUNDS, Permutation

MASK = 2**64 - 1


def plain(length: int, keys: list[int], place: int) -> int:
    """The item at a place, in Python's integers."""
    bits = max(2, (length - 1).bit_length())
    while True:
        low_bits, high_bits = bits // 2, bits - bits // 2
        for key in keys:
            high, low = place >> low_bits, place & (2**low_bits - 1)
            mixed = low ^ key
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & MASK
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & MASK
            mixed ^= mixed >> 31
            place = (low << high_bits) | (high ^ (mixed & (2**high_bits - 1)))
            low_bits, high_bits = high_bits, low_bits
        if place < length:
            return place


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.text(max_size=5))
def test_every_item_is_there_once(length: int, key: str) -> None:
    order = Permutation(length, key)
    assert sorted(order) == list(range(length))
    assert order[:] == [order[place] for place in range(length)]


@pytest.mark.parametrize("length", [1, 2, 3, 100_003, 2**20, 2**20 + 1, 10**10, 2**62])
def test_items_equal_the_plain_computation(length: int) -> None:
    order = Permutation(length, "known")
    keys = [int(key) for key in order._keys]
    assert len(keys) == ROUNDS
    for place in {0, length // 3, length // 2, length - 1}:
        assert order[place] == plain(length, keys, place)
    assert order[-1] == order[length - 1]
    with pytest.raises(IndexError):
        order[length]


def test_known_answers() -> None:
    """The order is part of what a checkpoint means: it must never change."""
    assert Permutation(10**10, "1/0")[5:3005:1000] == [4692788448, 3501389666, 9460210804]
    assert Permutation(100_003, "7/1")[:4] == [31163, 14833, 24262, 43971]


def test_places_keys_and_neighbours_are_independent() -> None:
    length = 100_003
    first, second = (np.array(Permutation(length, key)[:]) for key in ("0/0", "0/1"))
    for a, b in ((first[:-1], first[1:]), (first, second), (first, np.arange(length))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.015
    steps = np.histogram(np.diff(first) % length, bins=100)[0]
    expected = len(first) / 100
    chi_square = ((steps - expected) ** 2 / expected).sum()
    assert chi_square < 180, "99 degrees of freedom: 180 is one in a million"


def test_the_first_item_is_uniform_over_keys() -> None:
    firsts = Counter(Permutation(70_000, f"3/{epoch}")[0] // 7000 for epoch in range(2000))
    assert set(firsts) == set(range(10))
    assert all(abs(times - 200) < 70 for times in firsts.values()), "sigma is 13"
