"""Copies what a plan says from the files it is in to the file it goes to, by several threads.

A thread gathers stretches in a buffer that fits into the processor's cache, and writes it where
pages begin. That takes less of the processor than `copy_file_range`, which moves page after page as
soon as source and target lie at different places within a page, and than larger buffers do.
"""

import os
import resource
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.convert.plan import PlannedTensor
from harness.errors import FormatError
from harness.formats.dtypes import SIZES
from harness.formats.sources import StoredTensor

BUFFER = 512 << 10
"""Bytes; of each thread."""
TASK = 16 << 20
"""Bytes of the output that a thread takes on at a time."""
_PAGE = 4096

Progress = Callable[[int], object]
"""Is told how many more bytes have been written; by any thread."""


class Place(Protocol):
    """Where a tensor belongs in a file."""

    @property
    def start(self) -> int: ...


@dataclass(frozen=True)
class Chunk:
    """Bytes of a tensor's output, from `first` on, and their place in the file."""

    name: str
    planned: PlannedTensor
    first: int
    size: int
    place: int


@dataclass(frozen=True)
class Written:
    """What was written: `size` bytes from `place` on, with this CRC-32 (0 if not asked for)."""

    name: str
    place: int
    size: int
    crc: int


class Files:
    """Descriptors of the sources, each opened once. A context; threads may share it."""

    def __enter__(self) -> "Files":
        self._stack = ExitStack()
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, path: Path, view: memoryview, start: int) -> None:
        """Fills the view with a file's bytes from `start` on.

        Raises FormatError if there are fewer, OSError if they cannot be read.
        """
        with self._lock:
            if path not in self._descriptors:
                file = self._stack.enter_context(path.open("rb"))
                self._descriptors[path] = file.fileno()
        while view:
            got = os.preadv(self._descriptors[path], [view], start)
            if not got:
                raise FormatError(f"{path}: has become shorter while it was read")
            view, start = view[got:], start + got

    def elements(self, source: StoredTensor, first: int, size: int, buffer: memoryview) -> None:
        """Fills the beginning of the buffer with `size` bytes of a source, from `first` on."""
        for stretch in source.cut(first, size):
            self.read(stretch.path, buffer[: stretch.size], stretch.start)
            buffer = buffer[stretch.size :]

    def row_major(self, source: StoredTensor) -> Iterator[memoryview]:
        """The bytes of a source whose elements lie in another order, in order, about BUFFER at a
        time. All that lies in the file is in memory meanwhile."""
        import numpy as np  # late: few tensors need it

        ref = source.strided
        assert ref is not None
        (whole,) = source.ranges
        content = memoryview(bytearray(whole.size))
        self.read(whole.path, content, whole.start)
        flat = np.frombuffer(content, f"V{ref.itemsize}")
        strides = [step * ref.itemsize for step in ref.stride]
        elements = np.nditer(
            np.lib.stride_tricks.as_strided(flat, ref.shape, strides),
            ["external_loop", "buffered", "zerosize_ok"],
            order="C",
            buffersize=BUFFER // ref.itemsize,
        )
        for chunk in elements:
            yield memoryview(np.asarray(chunk).tobytes())


def copy(
    tensors: Mapping[str, PlannedTensor],
    places: Mapping[str, Place],
    target: int,
    workers: int,
    progress: Progress,
    with_crc: bool = False,
    whole: bool = False,
) -> list[Written]:
    """Writes every tensor to its place in the file `target`, a descriptor.

    `whole`: what is returned covers whole tensors, not stretches of 16 MiB or several small ones.
    Raises FormatError or OSError if something cannot be read or written; on that, and on an
    interrupt, the threads end before their next buffer.
    """
    stop = threading.Event()
    with Files() as files, ThreadPoolExecutor(workers, thread_name_prefix="copy") as pool:

        def run(parts: list[Chunk]) -> Written:
            return _Task(files, target, progress, with_crc, stop).run(parts)

        try:
            futures = [pool.submit(run, parts) for parts in tasks(tensors, places, whole)]
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures if future.done()]
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def tasks(
    tensors: Mapping[str, PlannedTensor], places: Mapping[str, Place], whole: bool
) -> Iterator[list[Chunk]]:
    """Parts that lie one after the other in the file, about TASK bytes at a time."""
    task: list[Chunk] = []
    filled = 0
    for name in sorted(tensors, key=lambda name: places[name].start):
        planned, start = tensors[name], places[name].start
        is_split = not whole and planned.source.strided is None
        step = TASK if is_split else max(planned.nbytes, 1)
        for first in range(0, max(planned.nbytes, 1), step):
            size = min(step, planned.nbytes - first)
            if task and (
                whole or filled + size > TASK or task[-1].place + task[-1].size != start + first
            ):
                yield task
                task, filled = [], 0
            task.append(Chunk(name, planned, first, size, start + first))
            filled += size
    if task:
        yield task


class _Task:
    """What one thread does: parts that lie one after the other in the file."""

    def __init__(
        self, files: Files, target: int, progress: Progress, with_crc: bool, stop: threading.Event
    ):
        self.files = files
        self.target = target
        self.progress = progress
        self.with_crc = with_crc
        self.stop = stop
        self.buffer = memoryview(bytearray(BUFFER))
        self.filled = 0
        self.place = 0
        self.crc = 0

    def run(self, parts: list[Chunk]) -> Written:
        self.place = parts[0].place
        for part in parts:
            source = part.planned.source
            if source.strided is not None:
                self.flush()
                for content in self.files.row_major(source):
                    self.put(self.converted(part.planned, content))
            elif source.dtype == part.planned.dtype:
                self.gather(part)
            else:
                self.flush()
                self.convert(part)
        self.flush()
        size = sum(part.size for part in parts)
        return Written(parts[0].name, parts[0].place, size, self.crc)

    def gather(self, part: Chunk) -> None:
        done = 0
        while done < part.size:
            space = BUFFER - self.place % _PAGE - self.filled
            size = min(space, part.size - done)
            view = self.buffer[self.filled : self.filled + size]
            self.files.elements(part.planned.source, part.first + done, size, view)
            self.filled += size
            done += size
            if size == space:
                self.flush()

    def convert(self, part: Chunk) -> None:
        source = part.planned.source
        width, target_width = source.itemsize, SIZES[part.planned.dtype]
        first, left = part.first // target_width, part.size // target_width
        while left:
            count = min(left, BUFFER // width)
            view = self.buffer[: count * width]
            self.files.elements(source, first * width, count * width, view)
            self.put(self.converted(part.planned, view))
            first, left = first + count, left - count

    def converted(self, planned: PlannedTensor, content: memoryview) -> memoryview:
        if planned.source.dtype == planned.dtype:
            return content
        from harness.formats.cast import cast  # late: plain copies need no numpy

        return cast(content, planned.source.dtype, planned.dtype)

    def flush(self) -> None:
        filled, self.filled = self.filled, 0
        self.put(self.buffer[:filled])

    def put(self, content: memoryview) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped")
        if self.with_crc:
            self.crc = zlib.crc32(content, self.crc)
        size = len(content)
        while content:
            written = os.pwrite(self.target, content, self.place)
            self.place += written
            content = content[written:]
        self.progress(size)
