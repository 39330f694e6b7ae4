"""A file of tensors that is being written: offsets are fixed, bytes come in any order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.formats.raw_io import write_at


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file: dtype (as named by the format), shape, and bytes, row-major.

    `start` and `end` are offsets in the file. In files of other programs `start` may be no multiple
    of the element size: such a tensor must be copied, not viewed.
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
    """Writes the tensors of a new file."""

    def __init__(self, descriptor: int, tensors: Mapping[str, TensorEntry]):
        self._descriptor = descriptor
        self.tensors = tensors
        """The entry of each tensor."""
        self.crcs: dict[str, int] = {}
        """The CRC-32 of each tensor's bytes; must be set for a `.pt`."""

    def fileno(self) -> int:
        """The descriptor, for callers that write the entries of `tensors` themselves."""
        return self._descriptor

    def write(self, name: str, data: Any, offset: int = 0) -> None:
        """Writes bytes (any contiguous buffer) of a tensor, from its byte `offset` on.

        Any thread may call it. Raises ValueError if they extend past the tensor.
        """
        entry, view = self.tensors[name], memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > entry.nbytes:
            raise ValueError(
                f"{name}: {len(view)} bytes at offset {offset} extend past its {entry.nbytes} bytes"
            )
        write_at(self._descriptor, view, entry.start + offset)
