"""Bytes of a file as tensors: read, or memory-mapped and read on use."""

import mmap
from pathlib import Path

import torch

from harness.errors import FormatError
from harness.formats.raw_io import read_into


class ByteFile:
    """An open file, whose bytes are returned as tensors. A context manager."""

    def __init__(self, path: Path, lazy: bool):
        """`lazy` maps the file. Raises FormatError if it is not a file, OSError if it cannot be
        read."""
        if path.exists() and not path.is_file():  # opening a pipe would block forever
            raise FormatError(f"{path}: not a regular file")
        self.path = path
        self.file = path.open("rb")
        self._lazy = lazy
        self._map: mmap.mmap | None = None

    def __enter__(self) -> "ByteFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # a map lives as long as tensors use it

    def tensor(self, start: int, size: int, alignment: int) -> torch.Tensor:
        """Bytes `start` to `start + size`, dtype uint8, at an aligned address.

        Writing to a mapped tensor leaves the file unchanged. Raises FormatError if it is shorter.
        """
        if self._lazy and size and start % alignment == 0:
            if self._map is None:
                self._map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
            if start + size <= len(self._map):
                return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=start)
        content = torch.empty(size, dtype=torch.uint8)
        read_into(self.file, content.numpy().data, start, self.path)
        return content
