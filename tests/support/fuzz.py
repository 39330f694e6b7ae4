"""Damaged files for readers that must not trust them: each loads, or is refused in one way."""

import resource
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from harness.errors import FormatError

MAX_GROWTH = 200_000
"""KiB of memory that the files together may take."""


def fuzz(
    path: Path,
    make: Callable[[Random], bytes],
    read: Callable[[int], object],
    count: int,
) -> int:
    """Writes `count` files that `make` returns to `path`, and calls `read` with their numbers.

    Fails if that raises anything but a FormatError which begins with the path, or if memory grows.
    Returns how many were read without an error.
    """
    random = Random(count)
    loaded = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        content = make(random)
        path.write_bytes(content)
        try:
            read(number)
            loaded += 1
        except FormatError as error:
            assert str(error).startswith(str(path)), content
        except Exception as error:
            raise AssertionError(content) from error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH
    return loaded


def mutated(
    content: bytes, random: Random, donors: Sequence[bytes], words: Sequence[bytes] = ()
) -> bytes:
    """The content after a few edits: bits flipped, bytes inserted, replaced, deleted, copied from
    one of the donors; or one of the words."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        position = random.randrange(len(data) + 1)
        length = random.choice((0, 1, 1, 2, 8, 40))
        donor = random.choice(donors)
        start = random.randrange(len(donor))
        new = random.choice(
            (
                b"",
                random.randbytes(length),
                bytes(byte ^ 1 << random.randrange(8) for byte in data[position : position + 1]),
                struct.pack("<I", random.choice((0, 1, 9, 2**31, 2**32 - 1))),
                donor[start : start + length],
            )
        )
        if words and random.random() < 0.6:
            new = random.choice(words)
        replaced = len(new) if random.random() < 0.5 else random.choice((0, 1, length))
        data[position : position + replaced] = new
    return bytes(data)
