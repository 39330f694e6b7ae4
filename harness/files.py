"""Files that another process may read: atomic rename, append by complete lines; locks."""

import ctypes
import errno
import fcntl
import json
import logging
import math
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path next to `path`, syncs the file, and renames it to `path`.

    A reader sees all of the old file or all of the new one. On an error the old file stays.
    """
    staged = staging_path(path)
    try:
        write(staged)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        if str(error.filename) == str(staged):  # a path that the user does not know
            error.filename = str(path)
        raise
    finally:
        staged.unlink(missing_ok=True)


def staging_path(path: Path) -> Path:
    """A temporary name next to `path`, of its own for every call: threads, and processes on other
    hosts with the same process id, may write the same `path` at once."""
    start = path.name[:50]  # a name may be too long to get longer
    return path.with_name(f".{start}.{os.urandom(4).hex()}.tmp")


def is_present(path: Path) -> bool:
    """Whether a file exists. Raises OSError if that cannot be found out."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(file: int, size: int, path: Path) -> None:
    """Sets the size of a new file (a descriptor), and reserves its disk space if possible.

    Writing to reserved blocks is also a quarter faster. Raises OSError, which names `path`, if
    there is not enough space.
    """
    disk = os.fstatvfs(file)
    code = errno.ENOSPC if disk.f_bavail * disk.f_frsize < size else 0
    libc = ctypes.CDLL(None, use_errno=True)
    if size and not code and hasattr(libc, "fallocate"):  # os.posix_fallocate may write zeros
        if libc.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        code = ctypes.get_errno()
    if code not in (0, errno.EOPNOTSUPP):
        raise OSError(code, f"{os.strerror(code)}: {size} bytes", str(path))
    os.ftruncate(file, size)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which names its owner. The system releases it when the process ends.

    Makes its directory, with mode 0700, if needed. Raises BlockingIOError if another process
    has it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise BlockingIOError(f"in use by {_owner(file.read())}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def holder(path: Path) -> str:
    """Who has a lock file, like "process 12 on node7"; empty if nobody, or if that cannot be found
    out. It only asks: a process that locks the file meanwhile is not disturbed."""
    if sys.platform != "linux":  # elsewhere struct flock is another one
        return ""
    flock = "hhqqi"
    asked = struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with path.open() as file:
            kind, *_ = struct.unpack(flock, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            return "" if kind == fcntl.F_UNLCK else _owner(file.read())
    except OSError:
        return ""


def _owner(content: str) -> str:
    return content.strip() or "another process"


def json_write(value: Any, path: Path) -> None:
    """Writes a value as indented JSON."""
    write_atomically(path, lambda staged: staged.write_text(json.dumps(value, indent=2) + "\n"))


def json_line(record: Mapping[str, Any], digits: int = 9) -> str:
    """A JSON object on one line, floats rounded to `digits` significant digits (a `time`, in
    seconds since the epoch, to milliseconds).

    JSON has no NaN or infinity: they become the strings "nan", "inf" and "-inf".
    """
    rounded = {key: truncate(value, digits) for key, value in record.items()}
    if isinstance(time := record.get("time"), float):
        rounded["time"] = truncate(time, max(digits, 13))
    return json.dumps(rounded)


class JsonLines:
    """Appends JSON objects to a file, one per line; any thread may write.

    A write error (a full disk) is logged once, and the records are lost: it must not end the run.
    An incomplete line, by an error or an earlier crash, is terminated before the next one.
    """

    def __init__(self, path: Path):
        """Raises OSError if the file cannot be opened."""
        self._file = path.open("ab+", buffering=0)
        self._lock = threading.Lock()
        self._is_failing = False
        self._file.seek(-1 if self._file.tell() else 0, os.SEEK_END)
        self._is_cut = self._file.read(1) not in (b"\n", b"")

    def write(self, record: Mapping[str, Any], digits: int = 9) -> None:
        """Appends `json_line(record, digits)`."""
        line = json_line(record, digits).encode() + b"\n"
        with self._lock:
            if self._file.closed:  # a thread that outlived the run
                return
            try:
                text = b"\n" + line if self._is_cut else line
                written = self._file.write(text)
                self._is_cut = written < len(text) and (self._is_cut or written > 0)
                if written < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:
                    log.error("%s: records are lost: %s", self._file.name, error)
                self._is_failing = True

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def truncate(value: Any, digits: int = 9) -> Any:
    """A float rounded to `digits` significant digits, as text if not finite; others unchanged."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)


def toml_write(tables: Mapping[str, Mapping[str, Any] | Sequence[Any]], path: Path) -> None:
    """Writes `toml_text`."""
    text = toml_text(tables)
    write_atomically(path, lambda staged: staged.write_text(text))


def toml_text(tables: Mapping[str, Mapping[str, Any] | Sequence[Any]]) -> str:
    """Tables of plain values (None is omitted), nested tables inline. Lists come first."""
    lists = {name: table for name, table in tables.items() if not isinstance(table, Mapping)}
    others = {name: table for name, table in tables.items() if isinstance(table, Mapping)}
    return "".join(f"{_key(name)} = {_toml(value)}\n" for name, value in lists.items()) + "\n".join(
        f"[{name}]\n"
        + "".join(f"{_key(k)} = {_toml(v)}\n" for k, v in table.items() if v is not None)
        for name, table in others.items()
    )


def _toml(value: Any) -> str:
    match value:
        case Mapping():
            pairs = (f"{_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
            return "{" + ", ".join(pairs) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case float():
            return repr(value)
        case _:
            text = json.dumps(value, ensure_ascii=False, default=str)
            return text.replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isascii() and bare.isalnum() else json.dumps(name)
