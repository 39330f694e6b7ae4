"""Writes `.pt` files of flat named tensors as torch.save does, streamed.

torch.load reads them with `weights_only=True`, and with `mmap=True`. The archive: `zips`; the
pickle: `_save` in torch/serialization.py.
"""

import math
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.errors import FormatError
from harness.files import reserve, write_atomically
from harness.formats import pt_reader, zips
from harness.formats.dtypes import SIZES, STORAGES
from harness.formats.raw_io import write_at
from harness.formats.tensor_writer import TensorEntry, TensorWriter


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    fill: Callable[[TensorWriter], object],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Writes a file whose `tensors` are `{name: (dtype, shape)}`, by atomic rename.

    The dtypes are those of `dtypes.SIZES`; `aliases` maps other names to names of tensors. `fill`
    is called once with the writer; it must write every byte and set every CRC. Raises FormatError,
    before writing, for what torch could not read; OSError if the disk is too full.
    """
    pickled = _pickle(tensors, aliases or {})
    if len(pickled) > pt_reader.MAX_PICKLE:
        raise FormatError(
            f"{path}: the names of {len(tensors)} tensors take {len(pickled)} bytes, expected at "
            f"most {pt_reader.MAX_PICKLE}"
        )
    small = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
    sizes = {name: len(content) for name, content in small.items()}
    for number, (dtype, shape) in enumerate(tensors.values()):
        sizes[f"data/{number}"] = math.prod(shape) * SIZES[dtype]
    records, headers, end = _records(path, sizes)
    entries = {
        name: TensorEntry(dtype, tuple(shape), record.start, record.start + record.size)
        for (name, (dtype, shape)), record in zip(
            tensors.items(), records[len(small) :], strict=True
        )
    }

    def write_staged(staged: Path) -> None:
        with staged.open("wb") as file:
            descriptor = file.fileno()
            reserve(descriptor, end, path)
            writer = TensorWriter(descriptor, entries)
            fill(writer)
            crcs = [*map(zlib.crc32, small.values()), *(writer.crcs[name] for name in tensors)]
            complete = [r._replace(crc=crc) for r, crc in zip(records, crcs, strict=True)]
            for record, header in zip(complete, headers, strict=True):
                write_at(descriptor, zips.local_header(record, header), header)
            for record, content in zip(complete, small.values(), strict=False):
                write_at(descriptor, content, record.start)
            write_at(descriptor, zips.directory(complete, headers, end), end)

    write_atomically(path, write_staged)


def _records(path: Path, sizes: Mapping[str, int]) -> tuple[list[zips.Record], list[int], int]:
    """The records in a row, without CRCs; the offsets of their headers; the end of the last one."""
    records, headers, end = [], [], 0
    for name, size in sizes.items():
        name = f"{path.stem}/{name}"
        headers.append(end)
        records.append(zips.Record(path, name, zips.data_start(end, name), size, crc=0))
        end = records[-1].start + size
    return records, headers, end


def _pickle(tensors: Mapping[str, tuple[str, Sequence[int]]], aliases: Mapping[str, str]) -> bytes:
    """The pickle of `{name: tensor}`, in opcodes; `_value` encodes plain values."""
    numbers = {name: number for number, name in enumerate(tensors)}
    opcodes = [b"\x80\x02}("]
    for name, stored in [*((name, name) for name in tensors), *aliases.items()]:
        dtype, shape = tensors[stored]
        stride, strides = 1, []
        for size in reversed(shape):
            strides.append(stride)
            stride *= max(size, 1)
        has_storage = dtype in STORAGES
        storage = f"torch\n{STORAGES[dtype]}" if has_storage else "torch.storage\nUntypedStorage"
        rebuild = "_rebuild_tensor_v2" if has_storage else "_rebuild_tensor_v3"
        length = math.prod(shape) * (1 if has_storage else SIZES[dtype])
        opcodes += (
            _value(name),
            f"ctorch._utils\n{rebuild}\n((".encode(),
            _value("storage") + f"c{storage}\n".encode() + _value(str(numbers[stored])),
            _value("cpu") + _value(length) + b"tQ",
            _value(0) + _value(tuple(shape)) + _value(tuple(reversed(strides))),
            b"\x89ccollections\nOrderedDict\n)R",
            b"" if has_storage else f"ctorch\n{dtype}\n".encode(),
            b"tR",
        )
    return b"".join([*opcodes, b"u."])


def _value(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes of a plain value, without its memo entries."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_value, value)) + b"t"
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")  # as pickle does
        return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
    return pickle.dumps(value, 2)[2:-1]
