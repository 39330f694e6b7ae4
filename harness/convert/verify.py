"""Whether a conversion may be believed: sources unharmed, layout understood, output as meant."""

import bisect
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from harness.convert.copy import BUFFER, Files, Progress, Written
from harness.errors import CheckpointError, FormatError
from harness.formats import pt_writer, zips
from harness.formats.sources import ByteRange, source
from harness.zero.reader import SavedEngine


def check_sources(ranges: Iterable[ByteRange], progress: Progress) -> None:
    """Reads every record that something is copied from. Raises FormatError at a wrong CRC.

    Only `.pt` files hold CRCs.
    """
    used: dict[Path, list[ByteRange]] = {}
    for stretch in ranges:
        if stretch.path.suffix in pt_writer.SUFFIXES:
            used.setdefault(stretch.path, []).append(stretch)
    for path, pieces in used.items():
        starts = sorted({piece.start for piece in pieces})
        for record in zips.records(path).values():
            first = bisect.bisect_left(starts, record.start)
            if first < len(starts) and starts[first] < record.start + record.size:
                record.verify()
                progress(record.size)


def check_layout(saved: SavedEngine) -> None:
    """At stages 1 and 2 the model's weights are the rounded masters: whether they are.

    They lie in different files, and only the layout says what belongs together. Raises
    CheckpointError that names the first parameter of which they differ.
    """
    from harness.formats.cast import cast, is_same  # late: it needs numpy

    own = saved.model["module"] | saved.experts
    if saved.stage not in (1, 2):
        return
    with Files() as files:
        for name in saved.shapes:
            if name not in own or own[name].dtype == "float32" or not own[name].is_contiguous:
                continue
            master, weight = saved.master(name), source(own[name])
            for first in range(0, master.numel(), BUFFER // 4):
                count = min(BUFFER // 4, master.numel() - first)
                theirs = memoryview(bytearray(count * master.itemsize))
                files.elements(master, first * master.itemsize, len(theirs), theirs)
                mine = memoryview(bytearray(count * weight.itemsize))
                files.elements(weight, first * weight.itemsize, len(mine), mine)
                rounded = cast(theirs, master.dtype, weight.dtype)
                if not is_same(rounded, mine, weight.dtype):
                    raise CheckpointError(
                        f"{saved.directory}: the {weight.dtype} weights of {name!r} are not its "
                        "master weights, rounded: files of two runs, or an unknown layout"
                    )


def check_output(path: Path, written: Iterable[Written], progress: Progress) -> None:
    """Reads back what was written, from the disk. Raises FormatError if it is something else."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for part in written:
            crc = 0
            for at in range(part.place, part.place + part.size, BUFFER):
                length = min(BUFFER, part.place + part.size - at)
                crc = zlib.crc32(os.pread(file.fileno(), length, at), crc)
            if crc != part.crc:
                raise FormatError(f"{path}: not what was written, at {part.name!r}")
            progress(part.size)
