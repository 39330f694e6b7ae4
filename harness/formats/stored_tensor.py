"""A tensor as byte ranges of files: what a conversion, or a resume, copies from."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.formats.dtypes import SIZES
from harness.formats.pt_reader import TensorRef


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`size` bytes of a file, from byte `start` on."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose elements, row-major, are the bytes of the ranges one after the other."""

    dtype: str
    """As in `dtypes.SIZES`."""
    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]
    strided: TensorRef | None = None
    """Set if its elements are in another order, inside the one range that has all of them."""

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
        """Bytes of an element."""
        return SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel() * self.itemsize

    def cut(self, start: int, size: int) -> Iterator[ByteRange]:
        """The ranges of `size` of its bytes, from byte `start` on; not of a strided one."""
        for range_ in self.ranges:
            skipped = min(start, range_.size)
            length = min(size, range_.size - skipped)
            if length:
                yield ByteRange(range_.path, range_.start + skipped, length)
            start, size = start - skipped, size - length
