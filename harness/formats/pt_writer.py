"""A `.pt` file of flat named tensors as torch.save writes it, streamed: places first, then bytes.

torch.load reads it with `weights_only=True`, and with `mmap=True`. The archive: PKWARE's
APPNOTE.TXT, 4.3 and 4.5.3 (64-bit sizes); the pickle: torch/serialization.py `_save`.
"""

import os
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import FormatError
from harness.files import reserve, write_atomically
from harness.formats import pt_reader
from harness.formats.dtypes import SIZES

SUFFIXES = {".pt", ".pth"}
_ALIGNMENT = 64
_WIDE = 0xFFFFFFFF
_NEEDS = 45
"""The version of the format that has 64-bit sizes."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype and shape, and its bytes from `start` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Writer:
    """A file that is being written: the tensors are filled in, in any order."""

    def __init__(self, descriptor: int, tensors: Mapping[str, Entry]):
        self._descriptor = descriptor
        self.tensors = tensors
        """Where each tensor's bytes belong."""
        self.crcs: dict[str, int] = {}
        """The CRC-32 of each tensor, for `fill` to note."""

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    fill: Callable[[Writer], object],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Writes a file whose `tensors` are `{name: (dtype, shape)}`, by atomic rename.

    dtypes are those of `dtypes.SIZES`; `aliases` names tensors that are stored under another name.
    `fill` is called once with the Writer, must write every byte, and note every CRC. Raises
    FormatError, before anything is written, for what torch could not read; OSError if the disk is
    too full.
    """
    pickled = _pickle(tensors, aliases or {})
    if len(pickled) > pt_reader.MAX_PICKLE:
        raise FormatError(f"{path}: the names of {len(tensors)} tensors take too much room")
    small = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
    stem = path.stem
    places: list[tuple[str, int, int]] = []  # record, start of its header, bytes
    entries: dict[str, Entry] = {}
    at = 0
    for name, content in small.items():
        places.append((f"{stem}/{name}", at, len(content)))
        at = _data_start(at, f"{stem}/{name}") + len(content)
    for number, (name, (dtype, shape)) in enumerate(tensors.items()):
        size = SIZES[dtype]
        for length in shape:
            size *= length
        record = f"{stem}/data/{number}"
        places.append((record, at, size))
        start = _data_start(at, record)
        entries[name] = Entry(dtype, tuple(shape), start, start + size)
        at = start + size

    def write_staged(staged: Path) -> None:
        with staged.open("wb") as file:
            reserve(file.fileno(), at, path)
            writer = Writer(file.fileno(), entries)
            fill(writer)
            crcs = [zlib.crc32(content) for content in small.values()]
            crcs += [writer.crcs[name] for name in tensors]
            directory = b""
            for (name, start, size), crc in zip(places, crcs, strict=True):
                os.pwrite(file.fileno(), _local(name, start, size, crc), start)
                directory += _described(name, start, size, crc)
            for (name, start, _), content in zip(places, small.values(), strict=False):
                os.pwrite(file.fileno(), content, _data_start(start, name))
            file.seek(at)
            file.write(directory + _end(len(places), len(directory), at))

    write_atomically(path, write_staged)


def _data_start(header: int, name: str) -> int:
    """Where the bytes of a record begin: behind its header, the name, and the extra fields."""
    least = header + 30 + len(name.encode()) + 20 + 4
    return -(-least // _ALIGNMENT) * _ALIGNMENT


def _local(name: str, start: int, size: int, crc: int) -> bytes:
    encoded = name.encode()
    padding = _data_start(start, name) - start - 30 - len(encoded) - 20 - 4
    extra = struct.pack("<2H2Q", 1, 16, size, size)
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    fields = (_NEEDS, 0x800, 0, 0, 0, crc, _WIDE, _WIDE, len(encoded), len(extra))
    return struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields) + encoded + extra


def _described(name: str, start: int, size: int, crc: int) -> bytes:
    encoded = name.encode()
    extra = struct.pack("<2H3Q", 1, 24, size, size, start)
    sizes = (crc, _WIDE, _WIDE, len(encoded), len(extra), 0, 0, 0, 0, _WIDE)
    fields = (_NEEDS, _NEEDS, 0x800, 0, 0, 0, *sizes)
    return struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + encoded + extra


def _end(count: int, length: int, start: int) -> bytes:
    end64 = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, _NEEDS, _NEEDS, 0, 0, count, count, length, start
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + length, 1)
    narrow = min(count, 0xFFFF)
    return (
        end64
        + locator
        + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, narrow, narrow, min(length, _WIDE), _WIDE, 0)
    )


_STORAGES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
"""The dtypes that have storages of their own; others are bytes to torch, under their dtype."""


def _pickle(tensors: Mapping[str, tuple[str, Sequence[int]]], aliases: Mapping[str, str]) -> bytes:
    """The pickle of `{name: tensor}`; `_value` writes plain values, the rest is spelt out."""
    numbers = {name: number for number, name in enumerate(tensors)}
    text = [b"\x80\x02}("]
    for name, kept in [*((name, name) for name in tensors), *aliases.items()]:
        dtype, shape = tensors[kept]
        stride, steps = 1, []
        for size in reversed(shape):
            steps.append(stride)
            stride *= max(size, 1)
        count = 1
        for size in shape:
            count *= size
        has_type = dtype in _STORAGES
        kind = f"torch\n{_STORAGES[dtype]}" if has_type else "torch.storage\nUntypedStorage"
        rebuild = "_rebuild_tensor_v2" if has_type else "_rebuild_tensor_v3"
        length = count if has_type else count * SIZES[dtype]
        text += (
            _value(name),
            f"ctorch._utils\n{rebuild}\n((".encode(),
            _value("storage") + f"c{kind}\n".encode() + _value(str(numbers[kept])),
            _value("cpu") + _value(length) + b"tQ",
            _value(0) + _value(tuple(shape)) + _value(tuple(reversed(steps))),
            b"\x89ccollections\nOrderedDict\n)R",
            b"" if has_type else f"ctorch\n{dtype}\n".encode(),
            b"tR",
        )
    return b"".join([*text, b"u."])


def _value(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes of a plain value, without its memo entries."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_value, value)) + b"t"
    if isinstance(value, str):
        encoded = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
    return pickle.dumps(value, 2)[2:-1]
