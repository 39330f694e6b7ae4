"""Zip archives as torch writes them: uncompressed records, one after the other, and a directory.

Only the directory at the end of an archive is parsed. Nothing is decompressed, so no archive grows
in memory; what torch does not write (compression, encryption, comments, splitting) is rejected.
The format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from harness.errors import FormatError
from harness.formats.raw_io import OpenFile, read_at, read_crc, read_into, size_of
from harness.remote_path import RemoteFile, map_reads

MAX_DIRECTORY = 64 << 20
"""Bytes; torch needs less than 100 per record."""
ALIGNMENT = 64
"""Bytes; alignment of the data of records that we write."""

_END, _END_MAGIC = struct.Struct("<4s4H2IH"), b"PK\x05\x06"
_END64, _END64_MAGIC = struct.Struct("<4sQ2H2I4Q"), b"PK\x06\x06"
_LOCATOR, _LOCATOR_MAGIC = struct.Struct("<4sIQI"), b"PK\x06\x07"
_ENTRY, _ENTRY_MAGIC = struct.Struct("<4s4H4x3I4H6xI"), b"PK\x01\x02"  # x: dates, attributes
_LOCAL, _LOCAL_MAGIC = struct.Struct("<4s5H3I2H"), b"PK\x03\x04"
_LOCAL_LENGTHS = struct.Struct("<4s22x2H")  # of a local header: its magic, and what follows it
_EXTRA = struct.Struct("<2H")  # of an extra field: its kind, and its length
_EXTRA_SIZES = 1  # the kind with 64-bit sizes
_EXTRA_PADDING = int.from_bytes(b"FB", "little")  # the kind with which torch aligns data
_STREAMED = 0x8
"""Flag: CRC and sizes are not in the local header; torch sets it."""
_UTF8 = 0x800
"""Flag: the name is UTF-8."""
_UNKNOWN_FLAGS = ~(_STREAMED | _UTF8)
_WIDE = 0xFFFFFFFF
"""Marks a 64-bit size, which is in the extra field."""
_VERSION = 45
"""The format version with 64-bit sizes."""

_SEVERAL = (
    "damaged, or several archives of torch.save, one after the other, as in the .distcp files of a "
    "sharded checkpoint of torch (DCP): give the directory that holds them"
)


class Record(NamedTuple):
    """A file in an archive: bytes `start` to `start + size`, and their CRC-32.

    `crc` None: nothing to check, as in formats other than zip.
    """

    path: Path
    name: str
    start: int
    size: int
    crc: int | None

    def read(self) -> bytes:
        """Its bytes. Raises FormatError if their CRC is wrong."""
        with self.path.open("rb") as file:
            data = bytearray(self.size)
            read_into(file, memoryview(data), self.start, self.path)
        self.check_crc(zlib.crc32(data))
        return bytes(data)

    def verify(self) -> None:
        """Reads it in chunks. Raises FormatError if the CRC is wrong."""
        with self.path.open("rb") as file:
            self.check_crc(read_crc(file, self.start, self.size, self.path))

    def check_crc(self, crc: int) -> None:
        """Raises FormatError unless its CRC is `crc`."""
        if self.crc is not None and crc != self.crc:
            raise FormatError(f"{self.path}: damaged: wrong CRC of {self.name}")


def records(path: Path) -> dict[str, Record]:
    """The records of an archive by name, in the order of the directory.

    Raises FormatError unless all are uncompressed and within the file, without overlap, under
    different names. Raises OSError if the file cannot be read.
    """
    with path.open("rb", buffering=0) as opened:
        file = _Pages(opened)
        limit, length, count = _directory(path, file)
        entries = _entries(path, file, limit, length, count)
        if isinstance(opened, RemoteFile):
            entries = file.loaded(list(entries))
        found = list(_located(path, file, limit, entries))
    by_name = {record.name: record for record in found}
    if len(by_name) < len(found):
        name = next(record.name for record in found if by_name[record.name] is not record)
        raise FormatError(f"{path}: two records are named {name!r}")
    end = 0
    for record in sorted(found, key=attrgetter("start", "size")):
        _, name, start, size, _ = record
        if start < end:
            raise FormatError(f"{path}: record {name!r} overlaps another record")
        end = start + size
    return by_name


def digest(path: Path) -> str:
    """SHA-256, in hex, of names, sizes and CRCs: it changes with any bit of the records.

    Raises as `records` does.
    """
    return _digest(records(path))


def _digest(records: Mapping[str, Record]) -> str:
    table = list(map(attrgetter("name", "size", "crc"), records.values()))
    return hashlib.sha256(repr(table).encode()).hexdigest()


def check(path: Path, size: int, expected_digest: str) -> dict[str, Record]:
    """The records of a file. Raises FormatError unless it has this size and this digest of its
    directory."""
    if not path.is_file():
        raise FormatError(f"{path} is missing")
    if (actual_size := path.stat().st_size) != size:
        raise FormatError(f"{path}: damaged: {actual_size} bytes, expected {size}")
    try:
        found = records(path)
    except FormatError as error:
        reason = str(error).removeprefix(f"{path}: ").removeprefix("damaged: ")
        raise FormatError(f"{path}: damaged: {reason}") from None
    if _digest(found) != expected_digest:
        raise FormatError(f"{path} is not the file that was saved: another digest")
    return found


def data_start(header: int, name: str) -> int:
    """The offset of a record's data, if we write its local header at offset `header`."""
    unaligned = header + _LOCAL.size + len(name.encode()) + 2 * _EXTRA.size + 16
    return -(-unaligned // ALIGNMENT) * ALIGNMENT


def local_header(record: Record, header: int) -> bytes:
    """The bytes from offset `header` up to the data of the record."""
    name, size = record.name.encode(), record.size
    extra = _EXTRA.pack(_EXTRA_SIZES, 16) + struct.pack("<2Q", size, size)
    padding = record.start - header - _LOCAL.size - len(name) - len(extra) - _EXTRA.size
    extra += _EXTRA.pack(_EXTRA_PADDING, padding) + b"Z" * padding
    fields = (_VERSION, _UTF8, 0, 0, 0, record.crc, _WIDE, _WIDE, len(name), len(extra))
    return _LOCAL.pack(_LOCAL_MAGIC, *fields) + name + extra


def directory(records: Sequence[Record], headers: Sequence[int], start: int) -> bytes:
    """The directory, for offset `start`, of records whose local headers are at `headers`."""
    entries = b"".join(map(_packed_entry, records, headers))
    count, length = len(records), len(entries)
    end64 = (44, _VERSION, _VERSION, 0, 0, count, count, length, start)
    count16 = min(count, 0xFFFF)
    return b"".join(
        (
            entries,
            _END64.pack(_END64_MAGIC, *end64),
            _LOCATOR.pack(_LOCATOR_MAGIC, 0, start + length, 1),
            _END.pack(_END_MAGIC, 0, 0, count16, count16, min(length, _WIDE), _WIDE, 0),
        )
    )


def _packed_entry(record: Record, header: int) -> bytes:
    name, size = record.name.encode(), record.size
    extra = _EXTRA.pack(_EXTRA_SIZES, 24) + struct.pack("<3Q", size, size, header)
    sizes = (record.crc, _WIDE, _WIDE, len(name), len(extra), 0, 0, _WIDE)
    return _ENTRY.pack(_ENTRY_MAGIC, _VERSION, _VERSION, _UTF8, 0, *sizes) + name + extra


class _Pages:
    """A file read in pages of `PAGE` bytes, the last of which is kept: the headers of small records
    lie close together."""

    PAGE = 4096
    AT_A_TIME = 4096  # headers, whose pages are at most 16 MB

    def __init__(self, file: OpenFile):
        self.size = size_of(file)
        self._file = file
        self._start, self._page = 0, b""
        self._loaded: dict[int, bytes] = {}

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from byte `start` on, or fewer at the end of the file."""
        at = start - self._start
        if at < 0 or at + size > len(self._page):
            page = self._loaded.pop(start, b"")
            self._page = page or read_at(self._file, start, max(size, self.PAGE))
            self._start, at = start, 0
        return self._page[at : at + size]

    def loaded(self, entries: Sequence["_Entry"]) -> Iterator["_Entry"]:
        """The entries, whose headers are to be read in their order: a store is asked for the pages
        of many at a time."""
        for first in range(0, len(entries), self.AT_A_TIME):
            some = entries[first : first + self.AT_A_TIME]
            self._load([header for _, header, _, _ in some])
            yield from some

    def _load(self, headers: Sequence[int]) -> None:
        starts = list(headers[:1])
        for header in headers:
            if not starts[-1] <= header <= starts[-1] + self.PAGE - _LOCAL.size:
                starts.append(header)
        pages = map_reads(lambda start: read_at(self._file, start, self.PAGE), starts, True)
        self._loaded = dict(zip(starts, pages, strict=True))
        self._start, self._page = 0, b""  # so that `read` takes these


def _directory(path: Path, file: _Pages) -> tuple[int, int, int]:
    """The directory's offset, its size in bytes, and its number of records."""
    size = file.size
    file.read(max(0, size - file.PAGE), file.PAGE)  # often the whole directory
    tail = file.read(max(0, size - _END.size - _LOCATOR.size), _END.size + _LOCATOR.size)
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(_END_MAGIC):
        raise FormatError(f"{path}: not a file of torch.save, or truncated: not a zip archive")
    _, disk, first_disk, on_disk, count, length, start, comment = _END.unpack(end)
    stop = size - _END.size
    is_wide = count == 0xFFFF or _WIDE in (length, start)
    if is_wide or tail.startswith(_LOCATOR_MAGIC):
        magic, disk, where, disks = _LOCATOR.unpack(tail[: _LOCATOR.size].rjust(_LOCATOR.size))
        if magic != _LOCATOR_MAGIC or disks != 1:
            raise FormatError(f"{path}: damaged: the end of the zip archive")
        if where + _END64.size + _LOCATOR.size != stop:
            raise FormatError(f"{path}: {_SEVERAL}")
        end64 = file.read(where, _END64.size)
        magic, _, _, _, disk, first_disk, on_disk, count, length, start = _END64.unpack(end64)
        stop = where
        if magic != _END64_MAGIC:
            raise FormatError(f"{path}: damaged: the end of the zip archive")
    if disk or first_disk or on_disk != count or comment:
        raise FormatError(f"{path}: a split or commented zip archive, which torch does not write")
    if start + length != stop or count * _ENTRY.size > length:
        raise FormatError(f"{path}: damaged: the zip directory is not where it should be")
    if length > MAX_DIRECTORY:
        raise FormatError(
            f"{path}: its zip directory has {length} bytes, expected at most {MAX_DIRECTORY}"
        )
    return start, length, count


_Entry = tuple[str, int, int, int]
"""Name, offset of the local header, size, CRC."""


def _entries(path: Path, file: _Pages, limit: int, length: int, count: int) -> Iterator[_Entry]:
    """The directory's entries. `limit`: where it begins."""
    data, position = file.read(limit, length), 0
    length = len(data)  # less if the file has just been cut
    unpack = _ENTRY.unpack_from
    for _ in range(count):
        name_start = position + _ENTRY.size
        if name_start > length:
            raise FormatError(f"{path}: damaged: the zip directory is truncated")
        fields = unpack(data, position)
        magic, _, _, flags, method, crc, packed, size, named, extra, noted, disk, header = fields
        name_end = name_start + named
        position = name_end + extra + noted
        if magic != _ENTRY_MAGIC or position > length or disk:
            raise FormatError(f"{path}: damaged: the zip directory")
        try:
            name = data[name_start:name_end].decode()
        except UnicodeDecodeError:
            raise FormatError(f"{path}: the name of a record is not UTF-8") from None
        if size == _WIDE or packed == _WIDE or header == _WIDE:
            wide = data[name_end : name_end + extra]
            size, packed, header = _wide_sizes(path, wide, size, packed, header)
        if method or packed != size:
            raise FormatError(f"{path}: record {name!r} is compressed, which torch does not do")
        if flags & _UNKNOWN_FLAGS:
            raise FormatError(f"{path}: record {name!r} is encrypted or patched")
        if header + _LOCAL.size > limit:
            raise FormatError(f"{path}: damaged: record {name!r} is not where it should be")
        yield name, header, size, crc
    if position != length:
        excess = length - position
        raise FormatError(f"{path}: damaged: {excess} extra bytes in the zip directory")


def _located(path: Path, file: _Pages, limit: int, entries: Iterable[_Entry]) -> Iterator[Record]:
    """The records of entries, by their local headers."""
    unpack, read = _LOCAL_LENGTHS.unpack, file.read
    for name, header, size, crc in entries:
        local = read(header, _LOCAL.size)
        if not local.startswith(_LOCAL_MAGIC) or len(local) < _LOCAL.size:
            raise FormatError(f"{path}: damaged: record {name!r} is not where it should be")
        _, local_name, local_extra = unpack(local)
        start = header + _LOCAL.size + local_name + local_extra
        if start + size > limit:
            raise FormatError(f"{path}: damaged: record {name!r} extends past the end of the data")
        yield Record(path, name, start, size, crc)


def _wide_sizes(path: Path, extra: bytes, *values: int) -> list[int]:
    """The sizes of an entry, with 64-bit ones from its extra field."""
    wide = b""
    while len(extra) >= _EXTRA.size:
        kind, length = _EXTRA.unpack_from(extra)
        if kind == _EXTRA_SIZES:
            wide = extra[_EXTRA.size : _EXTRA.size + length]
        extra = extra[_EXTRA.size + length :]
    sizes = []
    for value in values:
        if value == _WIDE:
            if len(wide) < 8:
                raise FormatError(f"{path}: damaged: a 64-bit size is missing")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        sizes.append(value)
    return sizes
