"""The directory of a zip archive as torch writes it: records side by side, stored as they are.

Only the directory at the end is read. Nothing is ever inflated, so no archive grows in memory; what
torch does not write (compression, encryption, comments, split archives) is refused.
The format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.
"""

import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from harness.errors import FormatError

MAX_DIRECTORY = 64 << 20
"""Bytes; torch needs less than a hundred for a record."""

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_STREAMED = 0x8
"""Flag: the local header does not tell CRC and sizes. torch sets it, and tells them elsewhere."""
_UTF8 = 0x800
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Record:
    """A stretch of a file: bytes `start` to `start + size`, and their CRC-32."""

    path: Path
    name: str
    start: int
    size: int
    crc: int

    def read(self) -> bytes:
        """All of it, the CRC checked. Raises FormatError if it is damaged."""
        with self.path.open("rb") as file:
            data = os.pread(file.fileno(), self.size, self.start)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise FormatError(f"{self.path}: damaged: wrong CRC of {self.name}")
        return data

    def verify(self) -> None:
        """Reads it a stretch at a time. Raises FormatError if the CRC is another one."""
        crc = 0
        with self.path.open("rb") as file:
            for at in range(self.start, self.start + self.size, _CHUNK):
                length = min(_CHUNK, self.start + self.size - at)
                crc = zlib.crc32(os.pread(file.fileno(), length, at), crc)
        if crc != self.crc:
            raise FormatError(f"{self.path}: damaged: wrong CRC of {self.name}")


def records(path: Path) -> dict[str, Record]:
    """The records of an archive by name, in the order of the directory.

    Raises FormatError unless all are stored, lie inside the file and not over each other, and have
    names of their own. Raises OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, length, count = _directory(path, file.fileno(), size)
        data = os.pread(file.fileno(), length, start)
        found: dict[str, Record] = {}
        at = 0
        for _ in range(count):
            record, at = _entry(path, file.fileno(), data, at, start)
            if record.name in found:
                raise FormatError(f"{path}: two records are named {record.name!r}")
            found[record.name] = record
    if at != len(data):
        raise FormatError(f"{path}: damaged: {len(data) - at} bytes too many in the directory")
    end = 0
    for record in sorted(found.values(), key=lambda record: (record.start, record.size)):
        if record.start < end:
            raise FormatError(f"{path}: record {record.name!r} overlaps another one")
        end = record.start + record.size
    return found


def digest(path: Path) -> str:
    """SHA-256, in hex, of names, sizes and CRCs: no bit of the records can change unseen by it.

    Raises as `records` does.
    """
    table = [(record.name, record.size, record.crc) for record in records(path).values()]
    return hashlib.sha256(repr(table).encode()).hexdigest()


def check(path: Path, size: int, content: str) -> None:
    """Raises FormatError unless the file has that size, and that digest of its directory."""
    if not path.is_file():
        raise FormatError(f"{path} is missing")
    if (found := path.stat().st_size) != size:
        raise FormatError(f"{path} has {found} bytes, expected {size}")
    if digest(path) != content:
        raise FormatError(f"{path} is another file than the one that was saved")


def _directory(path: Path, file: int, size: int) -> tuple[int, int, int]:
    """Where the directory starts, its bytes, and its number of records."""
    tail = os.pread(file, _END.size + _LOCATOR.size, max(0, size - _END.size - _LOCATOR.size))
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
        raise FormatError(f"{path}: no zip archive, as torch.save writes it, or cut off at the end")
    _, disk, first_disk, here, count, length, start, comment = _END.unpack(end)
    stop = size - _END.size
    if count == 0xFFFF or length == 0xFFFFFFFF or start == 0xFFFFFFFF or tail[:4] == b"PK\x06\x07":
        magic, disk, where, disks = _LOCATOR.unpack(tail[: _LOCATOR.size].rjust(_LOCATOR.size))
        if magic != b"PK\x06\x07" or disks != 1 or where + _END64.size > stop:
            raise FormatError(f"{path}: damaged: the end of the zip archive")
        end64 = os.pread(file, _END64.size, where)
        magic, _, _, _, disk, first_disk, here, count, length, start = _END64.unpack(end64)
        stop = where
        if magic != b"PK\x06\x06":
            raise FormatError(f"{path}: damaged: the end of the zip archive")
    if disk or first_disk or here != count or comment:
        raise FormatError(f"{path}: a split or commented zip archive, which torch does not write")
    if start + length != stop or count * _ENTRY.size > length:
        raise FormatError(f"{path}: damaged: the zip directory is not where it should be")
    if length > MAX_DIRECTORY:
        raise FormatError(f"{path}: a zip directory of {length} bytes, at most {MAX_DIRECTORY}")
    return start, length, count


def _entry(path: Path, file: int, data: bytes, at: int, limit: int) -> tuple[Record, int]:
    """The record that the directory describes at `at`, and where the next description starts."""
    if at + _ENTRY.size > len(data):
        raise FormatError(f"{path}: damaged: the zip directory is cut off")
    magic, _, _, flags, method, _, _, crc, packed, size, *rest = _ENTRY.unpack_from(data, at)
    name_length, extra_length, comment_length, disk, _, _, header = rest
    name_at = at + _ENTRY.size
    extra_at = name_at + name_length
    after = extra_at + extra_length + comment_length
    if magic != b"PK\x01\x02" or after > len(data) or disk:
        raise FormatError(f"{path}: damaged: the zip directory")
    try:
        name = data[name_at:extra_at].decode()
    except UnicodeDecodeError:
        raise FormatError(f"{path}: the name of a record is no UTF-8") from None
    extra = data[extra_at : extra_at + extra_length]
    size, packed, header = _wide(path, extra, size, packed, header)
    if method or packed != size:
        raise FormatError(f"{path}: record {name!r} is compressed, which torch does not do")
    if flags & ~(_STREAMED | _UTF8):
        raise FormatError(f"{path}: record {name!r} is encrypted or patched")
    local = os.pread(file, _LOCAL.size, header) if header + _LOCAL.size <= limit else b""
    if len(local) < _LOCAL.size or not local.startswith(b"PK\x03\x04"):
        raise FormatError(f"{path}: damaged: record {name!r} is not where it should be")
    *_, local_name, local_extra = _LOCAL.unpack(local)
    start = header + _LOCAL.size + local_name + local_extra
    if start + size > limit:
        raise FormatError(f"{path}: damaged: record {name!r} reaches over the end of the data")
    return Record(path, name, start, size, crc), after


def _wide(path: Path, extra: bytes, *values: int) -> list[int]:
    """The sizes of an entry: those that do not fit stand in the extra field 1, as 64 bits."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    found = []
    for value in values:
        if value == 0xFFFFFFFF:
            if len(wide) < 8:
                raise FormatError(f"{path}: damaged: a 64-bit size is missing")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        found.append(value)
    return found
