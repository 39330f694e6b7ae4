"""Counter-based random numbers: any process can generate any part of a random matrix bit for bit.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox4x32-10
encrypts a counter of four 32-bit words with a key of two, so there is no state to keep or share.
The counter is (column group, row, refresh, kind); the key is derived from a seed and a name.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

Key = tuple[int, int]
Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_STRIP = 2**14  # counters per call, so that their words stay in a CPU's cache

_GAUSSIAN, _SIGNS = 0, 1  # the counter's last word: each distribution has its own numbers


def philox4x32(counter: Words, key: Key) -> Words:
    """Philox4x32-10: four words of 32 random bits for each counter.

    Words are int64 tensors with values below 2**32; they broadcast against each other.
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


def gaussian(rows: range, columns: range, refresh: int, key: Key, device: torch.device) -> Tensor:
    """Rows and columns of a matrix with entries from N(0, 1): float32 (rows, columns).

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

    return _part(rows, columns, (refresh, _GAUSSIAN), key, device, normal, 4)


def rademacher(rows: range, columns: range, refresh: int, key: Key, device: torch.device) -> Tensor:
    """Rows and columns of a matrix with entries -1 and +1, equally likely: float32."""

    def signs(words: Words) -> list[Tensor]:
        return [1 - 2 * (word >> bit & 1) for word in words for bit in range(32)]

    return _part(rows, columns, (refresh, _SIGNS), key, device, signs, 128)


def _part(
    rows: range,
    columns: range,
    last_words: tuple[int, int],
    key: Key,
    device: torch.device,
    entries: Callable[[Words], list[Tensor]],
    width: int,
) -> Tensor:
    """The entries at (rows, columns); `entries` generates `width` adjacent ones per counter."""
    first, stop = columns.start // width, -(-columns.stop // width)
    groups = torch.arange(first, stop, device=device)
    high, low = (torch.full((), word, device=device) for word in last_words)  # no transfer
    part = torch.empty(len(rows), stop - first, width, device=device)
    strip = max(1, _STRIP // max(1, len(groups)))
    for start in range(0, len(rows), strip):
        row_strip = torch.arange(rows.start, rows.stop, device=device)[start : start + strip, None]
        columns_of_group = entries(philox4x32((groups, row_strip, high, low), key))
        part[start : start + strip] = torch.stack(columns_of_group, dim=-1)
    skipped = columns.start - first * width
    return part.flatten(1)[:, skipped : skipped + len(columns)]
