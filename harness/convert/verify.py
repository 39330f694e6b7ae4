"""Checks of a conversion: CRCs of sources and output, and the layout of the checkpoint."""

import bisect
import os
from collections.abc import Iterable
from pathlib import Path

from harness.convert.copy import BUFFER_SIZE, OnProgress, SourceFiles, Written
from harness.errors import CheckpointError, FormatError
from harness.formats import file_kinds, zips
from harness.formats.legacy_pt import is_legacy
from harness.formats.raw_io import read_crc
from harness.formats.stored_tensor import ByteRange, StoredTensor
from harness.zero.reader import SavedEngine


def check_sources(ranges: Iterable[ByteRange], progress: OnProgress) -> None:
    """Reads every record that is copied from. Raises FormatError for a wrong CRC.

    Only `.pt` files have CRCs, since torch 1.6.
    """
    by_path: dict[Path, set[int]] = {}
    for range_ in ranges:
        by_path.setdefault(range_.path, set()).add(range_.start)
    for path, unsorted_starts in by_path.items():
        if file_kinds.format_of(path) != file_kinds.PT or is_legacy(path):
            continue
        starts = sorted(unsorted_starts)
        for record in zips.records(path).values():
            first = bisect.bisect_left(starts, record.start)
            if first < len(starts) and starts[first] < record.start + record.size:
                record.verify()
                progress(record.size)


def check_masters(saved: SavedEngine) -> None:
    """Checks that the weights of all trained parameters, under each of their names, are the rounded
    masters; at stage 3 only those that the model keeps complete.

    They are in different files, and match only if the layout was understood and every file is that
    of its rank. Raises CheckpointError that names the first parameter whose weights differ.
    """
    checked: set[tuple[StoredTensor, str]] = set()
    with SourceFiles() as files:
        for name, ref in saved.weights.items():
            source = saved.sources.get(name)
            if source not in saved.shapes or ref.shape != saved.shapes[source]:
                continue
            weight, master = StoredTensor.from_ref(ref), saved.master(source)
            if weight == master or (weight, source) in checked:
                continue
            checked.add((weight, source))
            if not _is_rounded(files, weight, master):
                tied = f", which is tied to {source!r}," if source != name else ""
                raise CheckpointError(
                    f"{saved.directory}: the {weight.dtype} weights of {name!r}{tied} are not its "
                    "rounded master weights: files of different runs or ranks, or an unknown layout"
                )


def _is_rounded(files: SourceFiles, weight: StoredTensor, master: StoredTensor) -> bool:
    """Whether a weight is its master, rounded to the weight's dtype."""
    from harness.formats.cast import cast, is_same  # late: imports numpy

    pairs = (files.chunks(tensor, BUFFER_SIZE // master.itemsize) for tensor in (weight, master))
    return all(
        is_same(cast(exact, master.dtype, weight.dtype), rounded, weight.dtype)
        for rounded, exact in zip(*pairs, strict=True)
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
