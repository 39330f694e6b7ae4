"""Checks of a conversion's sources, with several threads: their CRCs, and the layout of the
checkpoint. `copy.check_copy` reads the output back."""

import bisect
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from harness.convert.copy import BUFFER_SIZE, OnProgress, SourceFiles, default_workers
from harness.errors import CheckpointError
from harness.formats import file_kinds, zips
from harness.formats.legacy_pt import is_legacy
from harness.formats.stored_tensor import ByteRange, StoredTensor
from harness.remote_path import READ_SIZE, is_remote
from harness.zero.reader import SavedEngine

T = TypeVar("T")


def check_sources(ranges: Iterable[ByteRange], progress: OnProgress, stop: threading.Event) -> None:
    """Reads every record that is copied from. Raises FormatError for a wrong CRC.

    Only `.pt` files have CRCs, since torch 1.6.
    """

    def verify(record: zips.Record) -> None:
        record.verify()
        progress(record.size)

    records: list[zips.Record] = []
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
                records.append(record)
    _check_all(verify, records, stop)


def check_masters(saved: SavedEngine, stop: threading.Event) -> None:
    """Checks that the weights of all trained parameters, under each of their names, are the rounded
    masters; at stage 3 only those that the model keeps complete.

    They are in different files, and match only if the layout was understood and every file is that
    of its rank. Raises CheckpointError that names the first parameter whose weights differ.
    """
    pairs: dict[tuple[StoredTensor, str], str] = {}
    for name, ref in saved.weights.items():
        source = saved.sources.get(name)
        if source in saved.shapes and ref.shape == saved.shapes[source]:
            pairs.setdefault((StoredTensor.from_ref(ref), source), name)

    def check(pair: tuple[StoredTensor, str]) -> None:
        (weight, source), name = pair, pairs[pair]
        master = saved.master(source)
        if weight != master and not _is_rounded(files, weight, master):
            tied = f", which is tied to {source!r}," if source != name else ""
            raise CheckpointError(
                f"{saved.directory}: the {weight.dtype} weights of {name!r}{tied} are not its "
                "rounded master weights: files of different runs or ranks, or an unknown layout"
            )

    with SourceFiles() as files:
        _check_all(check, pairs, stop)


def _is_rounded(files: SourceFiles, weight: StoredTensor, master: StoredTensor) -> bool:
    """Whether a weight is its master, rounded to the weight's dtype."""
    from harness.formats.cast import cast, is_same  # late: imports numpy

    size = READ_SIZE if is_remote(range_.path for range_ in weight.ranges[:1]) else BUFFER_SIZE
    pairs = (files.chunks(tensor, size // master.itemsize) for tensor in (weight, master))
    return all(
        is_same(cast(exact, master.dtype, weight.dtype), rounded, weight.dtype)
        for rounded, exact in zip(*pairs, strict=True)
    )


def _check_all(check: Callable[[T], None], items: Iterable[T], stop: threading.Event) -> None:
    """Calls `check` for each item, with several threads. Raises the error of the first one that
    has failed, in their order; those that have not begun are then left out, as after `stop`."""

    def check_unless_stopped(item: T) -> None:
        if stop.is_set():
            raise InterruptedError("stopped")
        check(item)

    with ThreadPoolExecutor(default_workers(), thread_name_prefix="check") as pool:
        futures = [pool.submit(check_unless_stopped, item) for item in items]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
