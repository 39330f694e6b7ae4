"""A run's checkpoints in an object store, or wherever else fsspec reaches (`checkpoint.remote`).

URL/NAME/
  best                           the name of the best one, by `checkpoint.best_metric`
  step-00001000.1764369033412/   a save, by its step and its time in ms: never written twice
    rank-00000.pt, ENGINE/...    as on the disk
    manifest.json                uploaded last: without it, the directory is not a checkpoint

An object appears whole or not at all, as in a store of objects; other file systems write it under
another name first.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.checkpoint.files import Stopped
from harness.checkpoint.manifest import Manifest, parse_manifest
from harness.config import Config
from harness.convert.run_checkpoints import BEST, MANIFEST
from harness.errors import CheckpointError, ConfigError, UnreadableCheckpoint

log = logging.getLogger(__name__)

CHUNK = 8 << 20
MOST_PARTS = 9_000  # S3 allows 10,000 of one object
OBJECT_STORES = {"s3", "gs", "abfs", "oci", "oss", "r2"}
"""They have no directories: making one might make a bucket."""
SECONDS_BETWEEN_LOOKS = 0.1  # of a thread that waits for the limit of bandwidth
PARALLEL_FILES = 4  # of a rank: its memory is a few chunks each


class Store:
    """The checkpoints below a URL. All methods raise CheckpointError if the store fails."""

    def __init__(self, url: str, mb_per_s: float = 0):
        """`mb_per_s`: limit of this process, in both directions together; 0: none.

        Raises CheckpointError if the URL is of an unknown kind, or its package is missing.
        """
        from fsspec.core import url_to_fs  # a dependency of torch

        self.url = url.rstrip("/")
        self._pace = Pace(mb_per_s * 1e6)
        try:
            self._files, self._root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"{url}: {error}") from None
        protocol = self._files.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)

    def checkpoints(
        self, all_readable: bool = False, read: Mapping[str, Manifest] | None = None
    ) -> dict[str, Manifest]:
        """The manifests of the complete checkpoints by name, the newest first; none if there is
        nothing at the URL. One whose manifest cannot be read is told, and left out.

        `all_readable`: raises UnreadableCheckpoint, if one may be complete for another version.
        `read`: those that were read before, which never change.
        """
        found = {}
        for name in self._names():
            with self._explained(name):
                if not self._files.exists(self._path(name, MANIFEST)):
                    continue
                if read and name in read:
                    found[name] = read[name]
                else:
                    text = self._files.cat_file(self._path(name, MANIFEST))
                    try:
                        found[name] = parse_manifest(text, f"{self.url}/{name}")
                    except CheckpointError as error:
                        if all_readable and isinstance(error, UnreadableCheckpoint):
                            raise
                        log.warning("passed over: %s", error)
        return dict(sorted(found.items(), key=lambda item: item[1].saved_at, reverse=True))

    def has(self, name: str, file: str, size: int) -> bool:
        """Whether the file of a checkpoint is there; objects appear whole."""
        with self._explained(f"{name}/{file}"):
            path = self._path(name, file)
            return self._files.exists(path) and self._files.size(path) == size

    def upload(self, source: Path, name: str, file: str, should_stop: Callable[[], bool]) -> None:
        """Copies a file. Raises OSError if it cannot be read; Stopped."""
        size = source.stat().st_size
        with source.open("rb") as read, self._writing(f"{name}/{file}", size) as write:
            self._copy(read.read, write, should_stop)

    def write_manifest(self, name: str, manifest: Manifest) -> None:
        """Makes uploaded files a checkpoint."""
        text = json.dumps(asdict(manifest), indent=2).encode()
        with self._writing(f"{name}/{MANIFEST}", len(text)) as write:
            write(text)

    def name_best(self, name: str) -> None:
        """Tells which checkpoint is the best one; "": none is."""
        path, known = self._path(BEST), ""
        with self._explained(BEST):
            if self._files.exists(path):
                known = self._files.cat_file(path).decode()
            if known and not name:
                self._files.rm_file(path)
        if name not in ("", known):
            with self._writing(BEST, len(name)) as write:
                write(name.encode())

    def download(self, name: str, file: str, target: Path) -> None:
        """Copies a file to an existing directory, where it appears whole. Raises OSError if it
        cannot be written."""
        staged = target.with_name(f".{target.name}.tmp")
        try:
            with staged.open("wb") as file_:
                with self._explained(f"{name}/{file}"):
                    source = self._files.open(self._path(name, file), "rb", block_size=CHUNK)
                with source:
                    self._copy(self._reader(source, f"{name}/{file}"), file_.write, lambda: False)
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes a checkpoint, first its manifest: half removed it must not look like one."""
        with self._explained(name):
            if self._files.exists(self._path(name, MANIFEST)):
                self._files.rm_file(self._path(name, MANIFEST))
            if self._files.exists(self._path(name)):
                self._files.rm(self._path(name), recursive=True)

    def unfinished(self) -> list[str]:
        """The names of directories without a manifest: an upload was killed, or is running."""
        with self._explained(""):
            return [n for n in self._names() if not self._files.exists(self._path(n, MANIFEST))]

    def _names(self) -> list[str]:
        with self._explained(""):
            try:
                paths = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = [path.rstrip("/").rpartition("/")[2] for path in paths]
        return [name for name in names if name.startswith("step-")]

    def _path(self, *names: str) -> str:
        return "/".join((self._root, *names))

    def _copy(
        self,
        read: Callable[[int], bytes],
        write: Callable[[bytes], Any],
        should_stop: Callable[[], bool],
    ) -> None:
        while chunk := read(CHUNK):
            if should_stop():
                raise Stopped
            self._pace.wait(len(chunk), should_stop)
            write(chunk)

    def _reader(self, source: Any, what: str) -> Callable[[int], bytes]:
        def read(size: int) -> bytes:
            with self._explained(what):
                return source.read(size)

        return read

    @contextmanager
    def _writing(self, what: str, size: int) -> Iterator[Callable[[bytes], Any]]:
        """A function that appends to a new object, which appears when the context ends."""
        path = self._path(what)
        block = CHUNK * (1 + size // (MOST_PARTS * CHUNK))  # in whole chunks, as Google wants it
        with self._explained(what):
            if not OBJECT_STORES.intersection(self._protocols):
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            target = self._open(path, block)

        def write(chunk: bytes) -> None:
            with self._explained(what):
                target.write(chunk)

        try:
            yield write
            with self._explained(what):
                target.close()
                target.commit()
        except BaseException:
            with suppress(Exception):  # it is the first error that counts
                target.discard()
            with suppress(AttributeError):  # of one in memory
                target.closed = True  # else fsspec's would be completed when it is collected
            raise

    def _open(self, path: str, block: int) -> Any:
        """A new object that appears with `commit`."""
        if "file" in self._protocols:  # fsspec's own would move it from another disk
            return _LocalFile(Path(path))
        return self._files.open(path, "wb", block_size=block, autocommit=False)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Makes an error of the store a CheckpointError: each back end raises its own kinds."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            where = f"{self.url}/{what}".rstrip("/")
            raise CheckpointError(f"{where}: {type(error).__name__}: {error}") from error


class _LocalFile:
    """A file that appears with `commit`, by rename."""

    def __init__(self, path: Path):
        self._path = path
        self._staged = path.with_name(f".{path.name}.tmp")
        self._file = self._staged.open("wb")
        self.write = self._file.write
        self.close = self._file.close

    def commit(self) -> None:
        self._staged.replace(self._path)

    def discard(self) -> None:
        self._file.close()
        self._staged.unlink(missing_ok=True)


class Pace:
    """Spreads bytes over time, for all threads of this process together. A thread that waits is
    done at once when it should stop: a chunk may take minutes."""

    def __init__(self, bytes_per_s: float):
        self._rate = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, count: int, should_stop: Callable[[], bool]) -> None:
        """Returns when so many bytes may be sent. Raises Stopped."""
        if not self._rate:
            return
        with self._lock:
            start = max(time.monotonic(), self._free_at)
            self._free_at = start + count / self._rate
        while (left := start - time.monotonic()) > 0:
            if should_stop():
                raise Stopped
            time.sleep(min(left, SECONDS_BETWEEN_LOOKS))


def open_store(config: Config) -> Store | None:
    """The store of the run's own checkpoints, if `checkpoint.remote` is set. Raises ConfigError."""
    settings = config.checkpoint
    if not settings.remote:
        return None
    try:
        return Store(f"{settings.remote.rstrip('/')}/{config.run.name}", settings.remote_mb_per_s)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.remote: {error}") from None


def split_url(url: str) -> tuple[str, str]:
    """The URL of a run's checkpoints, and the name of the one that was named, if one was."""
    base, _, last = url.rstrip("/").rpartition("/")
    return (base, last) if last.startswith("step-") else (url, "")


def remote_name(directory: Path, manifest: Manifest) -> str:
    """The name of a checkpoint in a store: that of its directory, and when it was saved, in ms."""
    return f"{directory.name}.{manifest.saved_at * 1e3:.0f}"


def local_name(name: str) -> str:
    """The name of the directory that `remote_name` belongs to."""
    return name.rpartition(".")[0]
