"""Files of torch.save before torch 1.6, which are not zip archives.

Five pickles in a row: a magic number, the version of the protocol, facts about the system, the
object, and the keys of its storages; then each storage, its number of elements (8 bytes) and its
bytes. There are no CRCs. The format: `_legacy_save` in torch/serialization.py.
"""

from pathlib import Path
from typing import Any

from harness.errors import FormatError
from harness.formats import unpickler
from harness.formats.dtypes import SIZES, STORAGE_DTYPES
from harness.formats.pickled import Global, PickleError
from harness.formats.raw_io import OpenFile, read_at, size_of
from harness.formats.zips import Record

MAX_PICKLE = 256 << 20
"""Most bytes of the pickle in a file."""

_PROTO = b"\x80"
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_REMEDY = "save it again with torch.save of torch 1.6 or newer"


def is_legacy(path: Path) -> bool:
    """Whether a file begins as a pickle. Raises OSError if it cannot be read."""
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise FormatError(f"{path}: not a regular file")
    with path.open("rb") as file:
        return file.read(1) == _PROTO


def read(path: Path) -> tuple[bytes, dict[str, Record]]:
    """The pickle of a file, and the bytes of each storage by its key.

    Raises FormatError if it is damaged, OSError if it cannot be read.
    """
    with path.open("rb") as file:
        size = size_of(file)
        head = read_at(file, 0, min(size, MAX_PICKLE))
        try:
            return _read(path, head, file, size)
        except PickleError as error:
            raise FormatError(f"{path}: cannot be read: {error}") from None


def _read(path: Path, head: bytes, file: OpenFile, size: int) -> tuple[bytes, dict[str, Record]]:
    widths: dict[str, int] = {}

    def find_storage(reference: Any) -> Any:
        match reference:
            case ("storage", Global(name=kind), str(key), str(), int(), None):
                if kind not in STORAGE_DTYPES:
                    raise PickleError(f"tensor data of the unknown type {kind!r:.80}")
                widths.setdefault(key, SIZES[STORAGE_DTYPES[kind]])
            case ("module", kind, *_):  # the class of a module, with its source
                return kind
            case ("storage", *_):
                raise PickleError(f"a view of tensor data, as in torch before 0.4: {_REMEDY}")
        return None

    def next_pickle(start: int) -> tuple[Any, int]:
        return unpickler.unpickle_first(head, start, _NO_GLOBALS, find_storage)

    magic, end = next_pickle(0)
    if magic != _MAGIC_NUMBER:
        raise FormatError(f"{path}: a pickle that torch.save did not write")
    version, end = next_pickle(end)
    system, end = next_pickle(end)
    if version != _PROTOCOL_VERSION or not isinstance(system, dict):
        raise FormatError(f"{path}: written by an unknown version of torch.save: {_REMEDY}")
    if system.get("little_endian") is not True:
        raise FormatError(f"{path}: not in little-endian byte order")
    start = end
    end = next_pickle(end)[1]
    pickled = head[start:end]
    keys, end = next_pickle(end)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("malformed: the keys of the tensor data")
    records: dict[str, Record] = {}
    for key in keys:
        count = int.from_bytes(read_at(file, end, 8), "little")
        length = count * widths.get(key, 1)
        if key in records or end + 8 + length > size:
            raise PickleError(f"the tensor data {key!r:.40} is truncated, or there twice")
        records[key] = Record(path, key, end + 8, length, crc=None)
        end += 8 + length
    if end != size:
        raise PickleError(f"{size - end} bytes after the tensor data")
    return pickled, records


_NO_GLOBALS: dict[str, Any] = {}
"""Nothing is made in the first pass: it looks for storages only."""
