"""A tensor as stretches of bytes in files: what a conversion, or a resume, copies from."""

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
    """A tensor whose elements, row-major, are the stretches one after the other."""

    dtype: str
    """As in `dtypes.SIZES`."""
    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]
    strided: TensorRef | None = None
    """Set if its elements lie in another order, inside the one stretch that holds all of them."""

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
        """The stretches of `size` of its bytes, from byte `start` on; not of a strided one."""
        for stretch in self.ranges:
            skipped = min(start, stretch.size)
            length = min(size, stretch.size - skipped)
            if length:
                yield ByteRange(stretch.path, stretch.start + skipped, length)
            start, size = start - skipped, size - length


def source(ref: TensorRef) -> StoredTensor:
    """A tensor of a `.pt` file."""
    if ref.is_contiguous:
        ranges = (ByteRange(ref.path, ref.start, ref.nbytes),) if ref.nbytes else ()
        return StoredTensor(ref.dtype, ref.shape, ranges)
    last = sum((size - 1) * step for size, step in zip(ref.shape, ref.stride, strict=True))
    whole = ByteRange(ref.path, ref.start, (last + 1) * ref.itemsize)
    return StoredTensor(ref.dtype, ref.shape, (whole,), ref)
