"""Bytes of a file as tensors: read, or mapped into memory and read where they are touched."""

import mmap
from pathlib import Path

import torch

from harness.errors import FormatError


class Bytes:
    """An open file, from which stretches are taken as tensors."""

    def __init__(self, path: Path, lazy: bool):
        """`lazy` maps the file. Raises FormatError if it is none, OSError if it cannot be read."""
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise FormatError(f"{path}: no regular file")
        self.path = path
        self.file = path.open("rb")
        self._lazy = lazy
        self._map: mmap.mmap | None = None

    def __enter__(self) -> "Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # a map stays as long as tensors lie in it

    def tensor(self, start: int, size: int, alignment: int) -> torch.Tensor:
        """Bytes `start` to `start + size`, dtype uint8, at an address that has the alignment.

        What is written to a mapped one stays out of the file. Raises FormatError if the file is
        shorter.
        """
        if self._lazy and size and start % alignment == 0:
            if self._map is None:
                self._map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
            if start + size <= len(self._map):
                return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=start)
        content = torch.empty(size, dtype=torch.uint8)
        self.file.seek(start)
        if self.file.readinto(content.numpy().data) != size:
            raise FormatError(f"{self.path}: cut off while it was read")
        return content
