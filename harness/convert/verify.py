"""Checks of a conversion: CRCs of sources and output, and the layout of the checkpoint."""

import bisect
import os
from collections.abc import Iterable
from pathlib import Path

from harness.convert.copy import BUFFER_SIZE, OnProgress, SourceFiles, Written
from harness.errors import CheckpointError, FormatError
from harness.formats import suffixes, zips
from harness.formats.raw_io import read_crc
from harness.formats.stored_tensor import ByteRange, StoredTensor
from harness.zero.reader import SavedEngine


def check_sources(ranges: Iterable[ByteRange], progress: OnProgress) -> None:
    """Reads every record that is copied from. Raises FormatError for a wrong CRC.

    Only `.pt` files have CRCs.
    """
    by_path: dict[Path, set[int]] = {}
    for range_ in ranges:
        if range_.path.suffix in suffixes.PT:
            by_path.setdefault(range_.path, set()).add(range_.start)
    for path, unsorted_starts in by_path.items():
        starts = sorted(unsorted_starts)
        for record in zips.records(path).values():
            first = bisect.bisect_left(starts, record.start)
            if first < len(starts) and starts[first] < record.start + record.size:
                record.verify()
                progress(record.size)


def check_masters(saved: SavedEngine) -> None:
    """Checks that the weights at stages 1 and 2 are the rounded masters.

    They are in different files, and match only if the layout was understood. Raises CheckpointError
    that names the first parameter whose weights differ.
    """
    from harness.formats.cast import cast, is_same  # late: imports numpy

    weights = saved.weights
    if saved.stage not in (1, 2):
        return
    with SourceFiles() as files:

        def read(tensor: StoredTensor, first: int, count: int) -> memoryview:
            content = memoryview(bytearray(count * tensor.itemsize))
            files.read_elements(tensor, first * tensor.itemsize, len(content), content)
            return content

        for name in saved.shapes:
            ref = weights.get(name)
            if ref is None or ref.dtype == "float32" or not ref.is_contiguous:
                continue
            master, weight = saved.master(name), StoredTensor.from_ref(ref)
            for first in range(0, master.numel(), BUFFER_SIZE // 4):
                count = min(BUFFER_SIZE // 4, master.numel() - first)
                rounded = cast(read(master, first, count), master.dtype, weight.dtype)
                if not is_same(rounded, read(weight, first, count), weight.dtype):
                    raise CheckpointError(
                        f"{saved.directory}: the {weight.dtype} weights of {name!r} are not its "
                        "rounded master weights: files of different runs, or an unknown layout"
                    )


def check_output(target: int, path: Path, written: Iterable[Written]) -> None:
    """Reads back from the disk what was written to `target`, a synced descriptor.

    Raises FormatError, which names `path`, if a CRC differs.
    """
    with Path(f"/proc/self/fd/{target}").open("rb") as file:
        descriptor = file.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for part in written:
            if read_crc(descriptor, part.start, part.size, path, BUFFER_SIZE) != part.crc:
                raise FormatError(f"{path}: {part.name!r} read back differs from what was written")
