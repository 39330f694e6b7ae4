"""Copies the bytes of planned tensors from their files to the output, with several threads.

Each thread gathers byte ranges in a buffer that fits into the CPU cache, and writes it at the
beginning of a page. That takes less CPU time than larger buffers, and than `copy_file_range`, which
moves single pages if source and target have different offsets within a page.
"""

import os
import resource
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.convert.plan import PlannedTensor
from harness.errors import FormatError
from harness.formats.dtypes import SIZES
from harness.formats.raw_io import OpenFile, read_into, write_at
from harness.formats.stored_tensor import StoredTensor
from harness.formats.tensor_writer import TensorEntry
from harness.remote_path import READ_SIZE, is_remote

BUFFER_SIZE = 512 << 10
"""Bytes per thread; READ_SIZE if they come from a store."""
TASK_SIZE = 16 << 20
"""Bytes of output per task of a thread."""
_PAGE = 4096

OnProgress = Callable[[int], object]
"""Called by any thread with the number of bytes just written."""


def default_workers() -> int:
    """The number of threads: as many as processors, at most 4."""
    return min(4, os.cpu_count() or 1)


class Chunk(NamedTuple):
    """`size` bytes of a tensor's output, from its byte `first` on; at `start` in the file."""

    name: str
    planned: PlannedTensor
    first: int
    size: int
    start: int

    @property
    def end(self) -> int:
        """Its end in the file."""
        return self.start + self.size


@dataclass(frozen=True)
class Written:
    """`size` bytes written from `start` on, and their CRC-32 (0 if not computed)."""

    name: str
    start: int
    size: int
    crc: int


class SourceFiles:
    """The open source files, each opened once. A context manager; threads may share it."""

    def __enter__(self) -> "SourceFiles":
        self._stack = ExitStack()
        self._files: dict[Path, OpenFile] = {}
        self._lock = threading.Lock()
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, path: Path, view: memoryview, start: int) -> None:
        """Fills the view with the bytes of a file, from `start` on. Raises as `read_into` does."""
        with self._lock:
            if path not in self._files:
                self._files[path] = self._stack.enter_context(path.open("rb"))
        read_into(self._files[path], view, start, path)

    def read_elements(
        self, source: StoredTensor, first: int, size: int, buffer: memoryview
    ) -> None:
        """Reads `size` bytes of a source, from `first` on, into the beginning of the buffer."""
        for range_ in source.cut(first, size):
            self.read(range_.path, buffer[: range_.size], range_.start)
            buffer = buffer[range_.size :]

    def chunks(self, source: StoredTensor, count: int) -> Iterator[memoryview]:
        """A source in row-major order, `count` elements at a time."""
        if source.strided is not None:
            content = memoryview(b"".join(self.read_row_major(source)))
            for first in range(0, source.nbytes, count * source.itemsize):
                yield content[first : first + count * source.itemsize]
            return
        for first in range(0, source.nbytes, count * source.itemsize):
            size = min(count * source.itemsize, source.nbytes - first)
            view = memoryview(bytearray(size))
            self.read_elements(source, first, size, view)
            yield view

    def read_row_major(self, source: StoredTensor) -> Iterator[memoryview]:
        """The bytes of a source that is not row-major, in row-major order, in chunks of about
        BUFFER_SIZE. Its range of the file is read into memory completely."""
        import numpy as np  # late: few tensors need it

        ref = source.strided
        assert ref is not None
        (extent,) = source.ranges
        content = memoryview(bytearray(extent.size))
        self.read(extent.path, content, extent.start)
        flat = np.frombuffer(content, f"V{ref.itemsize}")
        strides = [step * ref.itemsize for step in ref.stride]
        elements = np.nditer(
            np.lib.stride_tricks.as_strided(flat, ref.shape, strides),
            ["external_loop", "buffered", "zerosize_ok"],
            order="C",
            buffersize=BUFFER_SIZE // ref.itemsize,
        )
        for chunk in elements:
            yield memoryview(np.asarray(chunk).tobytes())


def copy(
    tensors: Mapping[str, PlannedTensor],
    entries: Mapping[str, TensorEntry],
    target: int,
    workers: int,
    progress: OnProgress,
    with_crc: bool = False,
    by_tensor: bool = False,
    overflows: set[str] | None = None,
) -> list[Written]:
    """Writes every tensor to its entry in the file `target`, a descriptor.

    `by_tensor`: the result has one item per tensor; otherwise an item is up to TASK_SIZE bytes of
    one or more tensors. `overflows` is filled with the names of tensors of which a finite number
    has become infinite. Raises FormatError or OSError if a read or write fails; the threads then
    end before their next buffer, as on an interrupt.
    """
    found = set() if overflows is None else overflows

    def copier(files: SourceFiles, stop: threading.Event) -> "_Copier":
        return _Copier(files, target, progress, with_crc, stop, found)

    return _run(copier, split_into_tasks(tensors, entries, by_tensor), workers)


def check_copy(
    tensors: Mapping[str, PlannedTensor],
    entries: Mapping[str, TensorEntry],
    target: int,
    workers: int,
    path: Path,
) -> None:
    """Reads back from the disk what `copy` has written to `target`, a synced descriptor, and
    compares each byte with what it would write again.

    Raises FormatError, which names `path`, if one differs; otherwise as `copy`.
    """
    with Path(f"/proc/self/fd/{target}").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def comparer(files: SourceFiles, stop: threading.Event) -> "_Copier":
            return _Comparer(files, file, stop, path)

        _run(comparer, split_into_tasks(tensors, entries, by_tensor=False), workers)


def _run(
    copier: Callable[[SourceFiles, threading.Event], "_Copier"],
    tasks: Iterable[list[Chunk]],
    workers: int,
) -> list[Written]:
    """Executes each task with a copier of its own."""
    stop = threading.Event()
    with SourceFiles() as files, ThreadPoolExecutor(workers, thread_name_prefix="copy") as pool:
        try:
            futures = [pool.submit(copier(files, stop).run, task) for task in tasks]
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures if future.done()]
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def split_into_tasks(
    tensors: Mapping[str, PlannedTensor], entries: Mapping[str, TensorEntry], by_tensor: bool
) -> Iterator[list[Chunk]]:
    """Lists of chunks that are contiguous in the output, of up to TASK_SIZE bytes each."""
    task: list[Chunk] = []
    task_size = 0
    for name in sorted(tensors, key=lambda name: entries[name].start):
        planned, start = tensors[name], entries[name].start
        nbytes = planned.nbytes
        can_split = not by_tensor and planned.source.strided is None
        step = TASK_SIZE if can_split else max(nbytes, 1)
        for first in range(0, max(nbytes, 1), step):
            size = min(step, nbytes - first)
            is_full = by_tensor or task_size + size > TASK_SIZE
            if task and (is_full or task[-1].end != start + first):
                yield task
                task, task_size = [], 0
            task.append(Chunk(name, planned, first, size, start + first))
            task_size += size
    if task:
        yield task


class _Copier:
    """Executes one task: gathers chunks in a buffer, and writes it to the file."""

    def __init__(
        self,
        files: SourceFiles,
        target: int,
        progress: OnProgress,
        with_crc: bool,
        stop: threading.Event,
        overflows: set[str],
    ):
        self.files = files
        self.target = target
        self.progress = progress
        self.with_crc = with_crc
        self.stop = stop
        self.overflows = overflows
        self.size = BUFFER_SIZE  # of the buffer
        self.filled = 0  # bytes of the buffer
        self.position = 0  # of the buffer in the file
        self.crc = 0

    def run(self, task: list[Chunk]) -> Written:
        self.position = task[0].start
        if is_remote(range_.path for range_ in task[0].planned.source.ranges[:1]):
            self.size = READ_SIZE
        self.buffer = memoryview(bytearray(self.size))
        for chunk in task:
            source = chunk.planned.source
            if source.strided is not None:
                self.flush()
                for content in self.files.read_row_major(source):
                    self.write(self.cast(chunk, content))
            elif source.dtype == chunk.planned.dtype:
                self.gather(chunk)
            else:
                self.flush()
                self.convert(chunk)
        self.flush()
        return Written(task[0].name, task[0].start, task[-1].end - task[0].start, self.crc)

    def gather(self, chunk: Chunk) -> None:
        done = 0
        while done < chunk.size:
            space = self.size - self.position % _PAGE - self.filled
            size = min(space, chunk.size - done)
            view = self.buffer[self.filled : self.filled + size]
            self.files.read_elements(chunk.planned.source, chunk.first + done, size, view)
            self.filled += size
            done += size
            if size == space:
                self.flush()

    def convert(self, chunk: Chunk) -> None:
        source = chunk.planned.source
        width, target_width = source.itemsize, SIZES[chunk.planned.dtype]
        first, remaining = chunk.first // target_width, chunk.size // target_width
        while remaining:
            count = min(remaining, self.size // width)
            view = self.buffer[: count * width]
            self.files.read_elements(source, first * width, count * width, view)
            self.write(self.cast(chunk, view))
            first, remaining = first + count, remaining - count

    def cast(self, chunk: Chunk, content: memoryview) -> memoryview:
        dtype, target = chunk.planned.source.dtype, chunk.planned.dtype
        if dtype == target:
            return content
        from harness.formats.cast import cast  # late: plain copies need no numpy

        return cast(content, dtype, target, lambda: self.overflows.add(chunk.name))

    def flush(self) -> None:
        filled, self.filled = self.filled, 0
        self.write(self.buffer[:filled])

    def write(self, content: memoryview) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped")
        if self.with_crc:
            self.crc = zlib.crc32(content, self.crc)
        write_at(self.target, content, self.position)
        self.position += len(content)
        self.progress(len(content))


class _Comparer(_Copier):
    """Compares with what is in the file, instead of writing to it."""

    def __init__(self, files: SourceFiles, written: OpenFile, stop: threading.Event, path: Path):
        super().__init__(files, written.fileno(), lambda _: None, False, stop, set())
        self.written = written
        self.path = path
        self.name = ""  # of the first tensor of the task
        self.found = bytearray()

    def run(self, task: list[Chunk]) -> Written:
        self.name = task[0].name
        return super().run(task)

    def write(self, content: memoryview) -> None:
        if self.stop.is_set():
            raise InterruptedError("stopped")
        if len(self.found) != len(content):
            self.found = bytearray(len(content))
        read_into(self.written, memoryview(self.found), self.position, self.path)
        if self.found != content:  # a memcmp, which of two memoryviews it is not
            raise FormatError(f"{self.path}: {self.name!r} read back differs from what was written")
        self.position += len(content)
