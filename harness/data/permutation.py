"""A random order of any number of items that takes no memory: computed, not stored.

A balanced or nearly balanced Feistel network is a permutation of the numbers below 2^bits (Luby &
Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions"); numbers
outside of the range are sent through it again until they are inside ("cycle walking": Black &
Rogaway 2002, "Ciphers with arbitrary finite domains"), on average less than twice. Its round
function is the finalizer of SplitMix64 (Steele, Lea & Flood 2014).
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

ROUNDS = 6
"""Of the network; four suffice against who may ask for any place."""


class Permutation(Sequence[int]):
    """The numbers 0 to length - 1 in an order that `key` determines. Any place, or slice of places,
    is computed when it is asked for. `length`: 1 to 2^62."""

    def __init__(self, length: int, key: str) -> None:
        self._length = length
        bits = max(2, (length - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._high_bits = np.uint64(bits - bits // 2)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> list[int]: ...

    def __getitem__(self, place: int | slice) -> int | list[int]:
        if isinstance(place, slice):
            return self.at(np.arange(*place.indices(self._length), dtype=np.int64)).tolist()
        if not -self._length <= place < self._length:
            raise IndexError(f"place {place} of {self._length}")
        return int(self.at(np.array([place % self._length]))[0])

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self._length, 4096):
            yield from self[start : start + 4096]

    def at(self, places: np.ndarray) -> np.ndarray:
        """The items (int64) at some places (int64, from 0 to length - 1)."""
        items = self._network(places.astype(np.uint64))
        while len(outside := np.flatnonzero(items >= self._length)):
            items[outside] = self._network(items[outside])
        return items.astype(np.int64)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        """A permutation of the numbers below 2^bits, of uint64."""
        low_bits, high_bits = self._low_bits, self._high_bits
        for key in self._keys:
            high, low = numbers >> low_bits, numbers & _mask(low_bits)
            # The halves change places, and with them their widths.
            numbers = (low << high_bits) | (high ^ (mixed(low ^ key) & _mask(high_bits)))
            low_bits, high_bits = high_bits, low_bits
        return numbers


def _mask(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def mixed(numbers: np.ndarray) -> np.ndarray:
    """A permutation of uint64 whose results look random: the finalizer of SplitMix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
