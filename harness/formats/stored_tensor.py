"""A tensor as byte ranges of files, from which conversions and resumes copy."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.formats.dtypes import SIZES
from harness.formats.pt_reader import TensorRef


class ByteRange(NamedTuple):
    """`size` bytes of a file, from byte `start` on."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose row-major elements are the concatenated bytes of the ranges."""

    dtype: str
    """A key of `dtypes.SIZES`."""
    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]
    strided: TensorRef | None = None
    """Set if the elements are in another order, within a single range."""

    @classmethod
    def from_ref(cls, ref: TensorRef) -> "StoredTensor":
        """A tensor of a `.pt` file."""
        if ref.is_contiguous:
            ranges = (ByteRange(ref.path, ref.start, ref.nbytes),) if ref.nbytes else ()
            return cls(ref.dtype, ref.shape, ranges)
        last = sum((size - 1) * step for size, step in zip(ref.shape, ref.stride, strict=True))
        extent = ByteRange(ref.path, ref.start, (last + 1) * ref.itemsize)
        return cls(ref.dtype, ref.shape, (extent,), ref)

    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel() * self.itemsize

    def cut(self, start: int, size: int) -> Iterator[ByteRange]:
        """The ranges of `size` of its bytes, from byte `start` on; not for a strided tensor."""
        for range_ in self.ranges:
            skipped = min(start, range_.size)
            length = min(size, range_.size - skipped)
            if length:
                yield ByteRange(range_.path, range_.start + skipped, length)
            start, size = start - skipped, size - length
