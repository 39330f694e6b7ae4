"""The files of a checkpoint: identified by a digest, verified without torch.

torch's files are zip archives with a CRC-32 of every tensor. The digest of a file is the SHA-256 of
its table of contents, CRCs included: it is computed without reading the tensors back, and still
detects any changed bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.errors import CheckpointError, FormatError, UnreadableCheckpoint
from harness.formats import zips


class Stopped(Exception):
    """A copy of a file was ended by its `should_stop`."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into an UnreadableCheckpoint: what cannot be read is not known to be
    damaged. `path`: what is read, if the error does not name it."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        raise UnreadableCheckpoint(f"cannot read {name}: {error.strerror}") from None


@dataclass(kw_only=True)
class FileEntry:
    """A file's entry in the manifest."""

    size: int
    """Bytes."""
    digest: str
    """SHA-256 of the archive's table of contents, in hex."""
    rank: int
    """The rank that wrote it."""

    def is_at(self, path: Path) -> bool:
        """Whether a file is there that is not truncated."""
        return path.is_file() and path.stat().st_size == self.size


def verify_file(path: Path, entry: FileEntry, read: bool = True) -> None:
    """Checks size and table of contents, and with `read` the CRC of every tensor.

    Raises CheckpointError with what was expected and found; UnreadableCheckpoint if the disk does
    not give it.
    """
    try:
        with reading(path):
            records = zips.check(path, entry.size, entry.digest)
            for record in records.values() if read else ():
                record.verify()
    except FormatError as error:
        raise CheckpointError(str(error)) from None


def bytes_text(size: int) -> str:
    """A number of bytes in four digits, aligned: "  1.024 kB"."""
    number, unit = float(size), "B "
    for larger in ("kB", "MB", "GB"):
        if number >= 1000:
            number, unit = number / 1000, larger
    return f"{number:7.4g} {unit}"
