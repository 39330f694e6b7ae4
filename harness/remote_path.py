"""Files of a store (whatever URL fsspec reaches), as paths that are read like those of a disk.

Of a file the ranges that are asked for are read, and nothing else. What a store tells of its files
is asked once: they must not change while they are read.
"""

import errno
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any, TypeVar

THREADS = 16
"""Requests at a time: each waits for the network."""
READ_SIZE = 8 << 20
"""Bytes of a request where much is read."""
_SMALL = 8 << 10
"""Bytes; reads of at most as many are kept: headers are looked at more than once."""

T = TypeVar("T")
U = TypeVar("U")
Info = dict[str, Any]
"""What fsspec tells of a file or directory."""
_known: dict[Path, Info] = {}
_listed: dict[Path, dict[Path, Info]] = {}


class StoreError(OSError):
    """A store does not give a file. The message names its URL."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class RemotePath(PosixPath):
    """A path in a store. Its methods for reading are those of a disk's, with their errors: a store
    that fails is an OSError.

    `file:///a` is kept as `file::/a`, since a path cannot hold the empty name of a host.
    """

    def __str__(self) -> str:
        scheme, _, rest = super().__str__().partition("/")
        if not scheme.endswith(":"):  # relative to another
            return super().__str__()
        return f"{scheme[:-1]}///{rest}" if scheme.endswith("::") else f"{scheme}//{rest}"

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        info = self._info()
        mode = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
        version = zlib.crc32(_version(info).encode())
        return os.stat_result((mode, version, 0, 1, 0, 0, int(info.get("size") or 0), 0, 0, 0))

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self._type() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self._type() == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self._type() == "directory"

    def is_symlink(self) -> bool:
        return False

    def absolute(self) -> "RemotePath":
        return self

    def iterdir(self) -> Iterator["RemotePath"]:  # type: ignore[override]
        if self._info()["type"] != "directory":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
        if self not in _listed:
            with _explained(self):
                files, path = _open_store(str(self))
                entries = files.ls(path, detail=True)
            names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries]
            is_other = [entry["name"].strip("/") != path.strip("/") for entry in entries]
            found = zip(names, entries, is_other, strict=True)
            _listed[self] = {self / name: entry for name, entry, other in found if name and other}
        return iter(_listed[self])  # type: ignore[arg-type]

    def glob(self, pattern: str, **_: Any) -> Iterator["RemotePath"]:  # type: ignore[override]
        """As of a disk, for the names in this directory."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def open(self, mode: str = "r", *_: Any, **__: Any) -> "RemoteFile":  # type: ignore[override]
        if mode != "rb":
            raise io.UnsupportedOperation(f"{self}: opened as {mode}: a store is only read")
        info = self._info()
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self))
        return RemoteFile(self, info)

    def read_text(self, *_: Any, **__: Any) -> str:
        return self.read_bytes().decode()

    def _type(self) -> str | None:
        try:
            return self._info()["type"]
        except FileNotFoundError:
            return None

    def _info(self) -> Info:
        if (siblings := _listed.get(self.parent)) is not None and self != self.parent:
            if self not in siblings:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
            return siblings[self]
        if self not in _known:
            with _explained(self):
                files, path = _open_store(str(self))
                _known[self] = files.info(path)
        return _known[self]


class RemoteFile(io.RawIOBase):
    """An open file of a store. Threads may share `read_at`."""

    def __init__(self, path: RemotePath, info: Info):
        if info.get("size") is None:  # HTTP without a length
            raise StoreError(errno.EIO, "its server tells no size: download it", str(path))
        self.size = int(info["size"])
        self._path = path
        self._version = _version(info)
        self._position = 0

    def read_at(self, start: int, size: int) -> bytes:
        """`size` bytes from byte `start` on, or fewer at the end of the file. Raises OSError."""
        end = min(start + size, self.size)
        if start >= end:
            return b""
        return (_fetch_small if size <= _SMALL else _fetch)(self._path, self._version, start, end)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self.read_at(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        return self.read(max(0, self.size - self._position)) or b""


def as_path(text: str) -> Path:
    """A path of a disk, or of a store if the text is a URL.

    Raises ValueError if the URL is of an unknown kind, its package is missing, or a path cannot
    hold it.
    """
    if "://" not in text:
        return Path(text)
    path = RemotePath(text.replace(":///", "::/", 1))
    if str(path) != text.rstrip("/"):  # of //, or ., a path would make another URL
        raise ValueError(f"{text}: a path would be {path}: download it, or give that URL")
    for known in (_known, _listed):  # what is there may have changed
        known.clear()
    _file_system.cache_clear()
    try:
        _open_store(text)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from None
    return path


def is_remote(paths: Iterable[Path]) -> bool:
    """Whether one of the paths is in a store."""
    return any(isinstance(path, RemotePath) for path in paths)


def map_reads(function: Callable[[T], U], items: Iterable[T], remote: bool) -> Iterator[U]:
    """`map`, with the requests to a store at the same time. Raises the first error in order."""
    if not remote:
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor  # late: 10 ms of every `harness inspect`

    with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as pool:
        yield from pool.map(function, items)


def _open_store(url: str) -> tuple[Any, str]:
    """fsspec's file system, and the path in it."""
    from fsspec.core import strip_protocol

    root = "/".join(url.split("/", 3)[:3])  # scheme and host
    return _file_system(root, os.getpid()), strip_protocol(url)


@lru_cache
def _file_system(root: str, _: int) -> Any:
    """One for all threads of a process: fsspec's own memory has one for each of them, and each of
    them would connect anew."""
    from fsspec.core import url_to_fs  # a dependency of torch

    return url_to_fs(root, use_listings_cache=False)[0]


def _fetch(path: RemotePath, version: str, start: int, end: int) -> bytes:
    with _explained(path):
        files, name = _open_store(str(path))
        content = files.cat_file(name, start=start, end=end)
        if len(content) != end - start:  # all of the file, from some servers of HTTP
            raise ValueError(
                f"asked for {end - start} bytes from byte {start} on, it sent {len(content)}: it "
                "has changed, or its server sends no ranges: download it"
            )
        return content


_fetch_small = lru_cache(4096)(_fetch)


def _version(info: Info) -> str:
    """Changes when a file is replaced, in every store."""
    return repr(sorted((key, str(value)) for key, value in info.items()))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Makes an error of the store an OSError with a number, a text and the URL: each back end
    raises its own kinds, and fsspec's have none of them."""
    try:
        yield
    except FileNotFoundError:
        code = errno.ENOENT
        raise FileNotFoundError(code, os.strerror(code), str(path)) from None
    except Exception as error:
        raise StoreError(errno.EIO, f"{type(error).__name__}: {error}", str(path)) from error
