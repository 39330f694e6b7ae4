"""Safetensors files: a reader that checks the header, and a streaming writer.

A file is the length of the header (8 bytes, little-endian), the header (JSON: dtype, shape and data
offsets of each tensor), and the data, without gaps or overlaps.
The format: https://github.com/huggingface/safetensors, README.md.

Checked in addition to the safetensors library 0.8: duplicate keys, shapes whose sizes overflow
although one of them is 0, fields that are not in the format, strings that are not Unicode.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import FormatError
from harness.files import reserve, write_atomically
from harness.formats import file_kinds
from harness.formats.raw_io import OpenFile, read_at, size_of
from harness.formats.tensor_writer import TensorEntry, TensorWriter

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element. torch has the same dtypes, but for those of 6 bits (`dtypes`)."""

MAX_HEADER = 100_000_000
"""Bytes; the same limit as in the safetensors library."""
MAX_DIMENSIONS = 64
METADATA = "__metadata__"
"""A reserved name: no tensor can have it."""
ALIGNMENT = 64
"""Bytes; alignment of the data in files that we write. Tensors are aligned to their elements."""

_BLANKS = re.compile(r"[ \t\r\n]*")
_MAX_ENTRY = 4096  # characters: MAX_DIMENSIONS numbers, with space for blanks
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Header:
    """The header of a file: its tensors in order, and its metadata."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises ValueError if they are not an integer, or overflow 63 bits."""
    if math.prod(size for size in shape if size) * BITS[dtype] >= 2**66:
        raise ValueError(f"shape {list(shape)} of {dtype} overflows")
    size, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    if rest:
        raise ValueError(f"shape {list(shape)} of {dtype} is not a whole number of bytes")
    return size


def read_header(path: Path) -> Header:
    """The header of a file, completely checked against the format and the size of the file.

    The tensors fill the file contiguously. Their names may be any Unicode, even "../x": never use
    one as a path. Raises FormatError if the file is not in the format, OSError if it cannot be
    read. Memory is limited to a few times the size of the header.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise FormatError(f"{path}: not a regular file")
    with path.open("rb") as file:
        return header_of(file, path)


def header_of(file: OpenFile, path: Path) -> Header:
    """`read_header` of an open file at its beginning; `path` is for errors."""
    available = size_of(file) - 8
    size = int.from_bytes(read_at(file, 0, 8), "little")
    try:
        if available < 0:
            raise ValueError("fewer than 8 bytes")
        if size > available:
            raise ValueError(
                f"its header should have {size} bytes, but the file has only {available} more"
            )
        if size > MAX_HEADER:
            raise ValueError(f"its header has {size} bytes, expected at most {MAX_HEADER}")
        header = _Parser(read_at(file, 8, size).decode(), 8 + size).header()
        _check_contiguous(header.tensors, 8 + size, 8 + available)
    except ValueError as error:  # also of bad UTF-8 and bad JSON
        if file_kinds.format_of(path) != file_kinds.SAFETENSORS:
            raise FormatError(f"{path}: not a safetensors file, but of torch.save") from None
        raise FormatError(f"{path}: not a safetensors file, or damaged: {error}") from None
    return header


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    fill: Callable[[TensorWriter], object],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file whose `tensors` are `{name: (dtype, shape)}`, by atomic rename.

    `fill` is called once with the writer; it must write every byte. The header keeps the order of
    `tensors`; the data is ordered by decreasing element size, so that all tensors are aligned.
    Raises FormatError, before writing, for what the format does not support; OSError if the disk is
    too full.
    """
    head, entries = make_header(tensors, metadata or {})
    size = max((entry.end for entry in entries.values()), default=len(head))

    def write_staged(staged: Path) -> None:
        with staged.open("wb") as file:
            reserve(file.fileno(), size, path)
            file.write(head)
            file.flush()
            fill(TensorWriter(file.fileno(), entries))

    write_atomically(path, write_staged)


def make_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The bytes before the data, and the entry of every tensor, as `write` writes them.

    Raises FormatError for what the format does not support.
    """
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: -BITS.get(tensors[name][0], 0)):
        dtype, shape = tensors[name]
        try:
            if name == METADATA:
                raise ValueError("a reserved name of the format")
            offsets[name] = end, end + _checked_size(dtype, shape)
            name.encode()
        except ValueError as error:
            raise FormatError(f"tensor {name!r}: {error}") from None
        end = offsets[name][1]
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    header |= {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets[name])}
        for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    start = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if start - 8 > MAX_HEADER:
        raise FormatError(f"the header has {start - 8} bytes, expected at most {MAX_HEADER}")
    head = (start - 8).to_bytes(8, "little") + text.ljust(start - 8)
    entries = {
        name: TensorEntry(dtype, tuple(shape), start + offsets[name][0], start + offsets[name][1])
        for name, (dtype, shape) in tensors.items()
    }
    return head, entries


class _Parser:
    """Parses the JSON of a header only, so that nothing invalid is ever built in memory."""

    def __init__(self, text: str, data_start: int):
        self.text = text
        self.data_start = data_start

    def header(self) -> Header:
        header = Header()

        def value(name: str, at: int) -> tuple[None, int]:
            if name == METADATA and self.text.startswith("null", at):
                at += len("null")
            elif name == METADATA:
                strings, at = self.object(at, lambda _, at: self.string(at))
                header.metadata.update(strings)
            else:
                header.tensors[name], at = self.entry(name, at)
            return None, at

        _, at = self.object(0, value)
        if self.blanks(at) != len(self.text):
            raise ValueError(f"unexpected text after the JSON object, at character {at}")
        return header

    def object(
        self, at: int, value: Callable[[str, int], tuple[Any, int]]
    ) -> tuple[dict[str, Any], int]:
        """The object at `at`, and its end. `value(key, at)` does the same for a value."""
        result: dict[str, Any] = {}
        at = self.blanks(self.expect("{", at))
        if self.text.startswith("}", at):
            return result, at + 1
        while True:
            key, at = self.string(self.blanks(at))
            if key in result:
                raise ValueError(f"duplicate key {key!r}")
            result[key], at = value(key, self.blanks(self.expect(":", self.blanks(at))))
            at = self.blanks(at)
            if self.text.startswith("}", at):
                return result, at + 1
            at = self.expect(",", at)

    def entry(self, name: str, at: int) -> tuple[TensorEntry, int]:
        end = self.text.find("}", at, at + _MAX_ENTRY) + 1
        try:
            fields = json.loads(self.text[at:end], object_pairs_hook=list)
            entry = dict(fields)
            if len(fields) != 3 or entry.keys() != {"dtype", "shape", "data_offsets"}:
                raise ValueError("expected dtype, shape and data_offsets")
            shape, offsets = _naturals(entry["shape"]), _naturals(entry["data_offsets"])
            size = _checked_size(entry["dtype"], shape)
            if len(offsets) != 2 or offsets[1] - offsets[0] != size:
                raise ValueError(f"data_offsets {list(offsets)} do not span its {size} bytes")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"tensor {name!r}: {error}") from None
        start, stop = (self.data_start + offset for offset in offsets)
        return TensorEntry(entry["dtype"], shape, start, stop), end

    def string(self, at: int) -> tuple[str, int]:
        if not self.text.startswith('"', at):
            raise ValueError(f"expected a string at character {at}")
        string, at = _DECODER.raw_decode(self.text, at)
        string.encode()  # half of a surrogate pair is not Unicode
        return string, at

    def expect(self, mark: str, at: int) -> int:
        if not self.text.startswith(mark, at):
            raise ValueError(f"expected {mark!r} at character {at}")
        return at + 1

    def blanks(self, at: int) -> int:
        match = _BLANKS.match(self.text, at)
        return match.end() if match else at


def _naturals(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError(f"expected a list of sizes, found {value!r:.60}")
    return tuple(value)


def _checked_size(dtype: Any, shape: Sequence[int]) -> int:
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"unknown dtype {dtype!r:.60}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions, expected at most {MAX_DIMENSIONS}")
    return nbytes_of(dtype, tuple(shape))


def _check_contiguous(tensors: Mapping[str, TensorEntry], start: int, end: int) -> None:
    """Raises ValueError unless the tensors fill the bytes from `start` to `end`, contiguously."""
    previous = "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != start:
            problem = "overlaps" if entry.start < start else "leaves a gap after"
            raise ValueError(f"tensor {name!r} {problem} {previous}")
        start, previous = entry.end, f"tensor {name!r}"
    if start != end:
        problem = "are missing" if start > end else "after the last tensor belong to no tensor"
        raise ValueError(f"{abs(end - start)} bytes {problem}")
