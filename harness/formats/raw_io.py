"""Reads and writes at a position of an open file: all bytes, or an error.

Threads may share a file: its own position is not used. It may be one of a store.
"""

import os
import zlib
from pathlib import Path
from typing import IO, Any

from harness.errors import FormatError
from harness.remote_path import READ_SIZE, RemoteFile

OpenFile = IO[Any] | RemoteFile
"""A file that is open for reading bytes."""

CHUNK_SIZE = 512 << 10
"""Bytes in memory while a CRC is computed; they fit into the processor's cache."""


def size_of(file: OpenFile) -> int:
    """Bytes of a file."""
    return file.size if isinstance(file, RemoteFile) else os.fstat(file.fileno()).st_size


def read_at(file: OpenFile, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on, or fewer at its end. Raises OSError."""
    if isinstance(file, RemoteFile):
        return file.read_at(start, size)
    return os.pread(file.fileno(), size, start)


def read_into(file: OpenFile, view: memoryview, start: int, path: Path) -> None:
    """Fills the view with bytes of a file, from `start` on.

    Raises FormatError, which names `path`, if there are fewer; OSError if they cannot be read.
    """
    while view:
        if isinstance(file, RemoteFile):
            content = file.read_at(start, min(len(view), READ_SIZE))
            count = len(content)
            view[:count] = content
        else:
            count = os.preadv(file.fileno(), [view], start)
        if not count:
            raise FormatError(f"{path}: truncated while it was read")
        view, start = view[count:], start + count


def read_crc(file: OpenFile, start: int, size: int, path: Path) -> int:
    """The CRC-32 of `size` bytes of a file from `start` on. Raises as `read_into` does."""
    crc = 0
    chunk_size = READ_SIZE if isinstance(file, RemoteFile) else CHUNK_SIZE
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
