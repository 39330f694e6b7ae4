"""A file of tensors while it is written: places are fixed, the bytes follow in any order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.formats.raw_io import write_at


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: its dtype as the format names it, its shape, and its bytes, row-major.

    `start` and `end` count from the beginning of the file. In files of other programs `start` need
    not be a multiple of the element's size: such a tensor must be copied, not viewed.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.end - self.start


class TensorWriter:
    """Fills in the tensors of a new file."""

    def __init__(self, descriptor: int, tensors: Mapping[str, Entry]):
        self._descriptor = descriptor
        self.tensors = tensors
        """The place of each tensor."""
        self.crcs: dict[str, int] = {}
        """The CRC-32 of each tensor's bytes: whoever fills a `.pt` must set it."""

    def fileno(self) -> int:
        """The descriptor, for those who write to the places in `tensors` themselves."""
        return self._descriptor

    def write(self, name: str, data: Any, offset: int = 0) -> None:
        """Writes bytes (any contiguous buffer) of a tensor, from its byte `offset` on.

        Any thread may call it. Raises ValueError if they reach beyond the tensor.
        """
        entry, view = self.tensors[name], memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > entry.nbytes:
            raise ValueError(f"{name}: {len(view)} bytes at {offset} of {entry.nbytes}")
        write_at(self._descriptor, view, entry.start + offset)
