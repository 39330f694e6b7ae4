"""Reads and writes at a position of an open file: all bytes, or an error.

Threads may share a descriptor: its own position is not used.
"""

import os
import zlib
from pathlib import Path

from harness.errors import FormatError

CHUNK_SIZE = 512 << 10
"""Bytes in memory while a CRC is computed; they fit into the processor's cache."""


def read_into(file: int, view: memoryview, start: int, path: Path) -> None:
    """Fills the view with bytes of a file (a descriptor), from `start` on.

    Raises FormatError, which names `path`, if there are fewer; OSError if they cannot be read.
    """
    while view:
        count = os.preadv(file, [view], start)
        if not count:
            raise FormatError(f"{path}: truncated while it was read")
        view, start = view[count:], start + count


def read_crc(file: int, start: int, size: int, path: Path, chunk_size: int = CHUNK_SIZE) -> int:
    """The CRC-32 of `size` bytes of a file from `start` on. Raises as `read_into` does."""
    crc = 0
    buffer = memoryview(bytearray(min(size, chunk_size)))
    for position in range(start, start + size, chunk_size):
        chunk = buffer[: min(chunk_size, start + size - position)]
        read_into(file, chunk, position, path)
        crc = zlib.crc32(chunk, crc)
    return crc


def write_at(file: int, data: memoryview | bytes, start: int) -> None:
    """Writes all of the data to a file (a descriptor) from byte `start` on. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, start)
        view, start = view[count:], start + count
