"""Counter-based random numbers: any process can generate any part of a random matrix bit for bit.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox4x32-10
encrypts a counter of four 32-bit words with a key of two, so there is no state to keep or share.
The counter is (column group, row, refresh, kind); the key is derived from a seed and a name.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.devices import limits

Key = tuple[int, int]
Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85

_GAUSSIAN, _SIGNS = 0, 1  # the counter's last word: each distribution has its own numbers


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four words of 32 random bits for each counter.

    Words and keys are int64 tensors with values below 2**32; they broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product's 64 bits are correct, although the highest one is int64's sign bit.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def key_of(seed: int, name: str) -> Key:
    """The key of a seed and a name, independent of the process and of the order of names."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def gaussian(
    rows: range, columns: range, refreshes: Sequence[int], keys: Sequence[Key], device: torch.device
) -> Tensor:
    """The same part of several matrices with entries from N(0, 1), one for each refresh and key:
    float32 (keys, rows, columns).

    Box and Muller, "A note on the generation of random normal deviates", 1958. In float64, so that
    last-bit differences of a logarithm between devices or parts disappear after rounding.
    """

    def normal(words: Words) -> list[Tensor]:
        uniform = [(word.double() + 0.5) * 2**-32 for word in words]
        normals = []
        for first, second in (uniform[:2], uniform[2:]):
            radius, angle = first.log_().mul_(-2).sqrt_(), second.mul_(2 * math.pi)
            normals += [angle.cos().mul_(radius), angle.sin_().mul_(radius)]
        return normals

    return _parts(rows, columns, (refreshes, _GAUSSIAN), keys, device, normal, 4)


def rademacher(
    rows: range, columns: range, refreshes: Sequence[int], keys: Sequence[Key], device: torch.device
) -> Tensor:
    """As `gaussian`, with entries -1 and +1, equally likely."""

    def signs(words: Words) -> list[Tensor]:
        return [1 - 2 * (word >> bit & 1) for word in words for bit in range(32)]

    return _parts(rows, columns, (refreshes, _SIGNS), keys, device, signs, 128)


def _parts(
    rows: range,
    columns: range,
    last_words: tuple[Sequence[int], int],
    keys: Sequence[Key],
    device: torch.device,
    entries: Callable[[Words], list[Tensor]],
    width: int,
) -> Tensor:
    """The entries at (rows, columns); `entries` generates `width` adjacent ones per counter."""
    first, stop = columns.start // width, -(-columns.stop // width)
    groups = torch.arange(first, stop, device=device)
    every_row = torch.arange(rows.start, rows.stop, device=device)
    parts = torch.empty(len(keys), len(rows), stop - first, width, device=device)
    most = limits(device).counters
    matrices = max(1, most // max(1, parts[0].numel() // width))
    height = max(1, most // max(1, matrices * len(groups)))
    for some in _slices(len(keys), matrices):
        refresh, *key = (
            _words(words, device) for words in (last_words[0][some], *zip(*keys[some], strict=True))
        )
        kind = torch.full((), last_words[1], device=device)
        for strip in _slices(len(rows), height):
            counter = groups, every_row[strip, None], refresh, kind
            columns_of_group = entries(philox4x32(counter, (key[0], key[1])))
            parts[some, strip] = torch.stack(columns_of_group, dim=-1)
    skipped = columns.start - first * width
    return parts.flatten(2)[:, :, skipped : skipped + len(columns)]


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, size, step)]


def _words(words: Sequence[int], device: torch.device) -> Tensor:
    """A word for each matrix, (n, 1, 1). Filled in on the device: a copy would wait for it."""
    filled = [torch.full((), word, device=device) for word in words]
    return torch.stack(filled)[:, None, None]
