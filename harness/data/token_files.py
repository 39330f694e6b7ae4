"""Corpora of tokens in files that are mapped into memory, as datasets; usable without harness.

    NAME.bin, NAME.idx   tokens, and where their documents end: Megatron-LM's format
                         (megatron/core/datasets/indexed_dataset.py), which `harness data prepare`
                         writes
    NAME.npy             a one-dimensional array of integers
    NAME.bin             bare tokens, uint16 unless said otherwise

Nothing is read before it is asked for, and processes of one machine share the pages.
"""

import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from harness.files import write_atomically

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Of an index: magic, version, code of the dtype, sequences, boundaries of documents."""
DTYPES = dict(enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), start=1))
"""By code."""
SCANNED = 1 << 24
"""Tokens that are searched for the end of documents at once."""


class TokenFile:
    """A corpus: `tokens`, 1-D of some integer dtype, and `ends`, the place after the last token of
    each document (int64)."""

    def __init__(self, path: str | Path, *, dtype: str = "uint16", separator: int | None = None):
        """`path`: .npy, .bin, .idx, or the name of a pair of .bin and .idx without its suffix.
        `dtype`: of a .bin without .idx. `separator`: the token that ends each document, where no
        .idx says so; without it the file is one document.

        Raises FileNotFoundError, and ValueError for a file that is damaged or not such a corpus.
        """
        self._arguments = (path, dtype, separator)
        self.path = Path(path)
        index = self.path.with_name(f"{_stem(self.path)}.idx")
        if self.path.suffix == ".npy":
            self.tokens = np.load(self.path, mmap_mode="r")
        elif index.is_file():
            self.path = index.with_suffix(".bin")
            self.tokens, self.ends = _read_pair(self.path, index)
            return
        else:
            if self.path.suffix != ".bin" or not self.path.is_file():
                raise FileNotFoundError(f"{path}: no such corpus: expected .npy, .bin, or .idx")
            self.tokens = _mapped(self.path, np.dtype(dtype))
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            shape, kind = list(self.tokens.shape), self.tokens.dtype
            raise ValueError(f"{self.path}: found {kind} {shape}, expected integers in 1 dimension")
        self.ends = self._scan(separator)

    def __reduce__(self) -> Any:  # a worker that is not forked maps the file itself
        path, dtype, separator = self._arguments
        return partial(TokenFile, path, dtype=dtype, separator=separator), ()

    def _scan(self, separator: int | None) -> np.ndarray:
        """The ends of the documents, each after a separator; of the last one also without."""
        found = []
        if separator is not None:
            for start in range(0, len(self.tokens), SCANNED):
                part = self.tokens[start : start + SCANNED]
                found.append(np.flatnonzero(part == separator) + (start + 1))
        ends = np.concatenate(found) if found else np.empty(0, np.int64)
        if len(self.tokens) and (not len(ends) or ends[-1] < len(self.tokens)):
            ends = np.append(ends, len(self.tokens))
        return ends.astype(np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, start: int, end: int) -> Tensor:
        """Tokens from `start` to before `end`, int64."""
        return torch.from_numpy(self.tokens[start:end].astype(np.int64))


class TokenWindows(Dataset[Tensor]):
    """A corpus cut into windows of `length` + 1 tokens, int64.

    The last token of one is the first of the next, so that each token but the first is predicted
    once. What does not fill a window at the end is left out.

    Raises ValueError for a corpus that is shorter than a window.
    """

    def __init__(self, corpus: TokenFile, length: int):
        self.corpus, self.length = corpus, length
        self._count = (len(corpus) - 1) // length
        if self._count < 1:
            raise ValueError(
                f"{corpus.path}: {len(corpus)} tokens, fewer than a window of {length} + 1"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        return self.corpus.slice(index * self.length, (index + 1) * self.length + 1)


class Documents(Dataset[Tensor]):
    """The documents of a corpus, each int64 [its length]; `lengths` for samplers and packers."""

    def __init__(self, corpus: TokenFile):
        self.corpus = corpus
        self.lengths = np.diff(corpus.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        end = int(self.corpus.ends[index])
        return self.corpus.slice(end - int(self.lengths[index]), end)


class TokenWriter:
    """Writes a pair of .bin and .idx, document by document.

    Both appear when the context ends without an error, the .idx last: a .bin that is replaced never
    has the .idx of another one.
    """

    def __init__(self, path: Path, dtype: Any):
        """`path`: with or without a suffix. `dtype`: uint8, uint16 or int32. Raises OSError."""
        self._bin = path.with_name(f"{_stem(path)}.bin")
        self._index = self._bin.with_suffix(".idx")
        self._staged = self._bin.with_name(f".{self._bin.name}.tmp")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths: list[np.ndarray] = []
        self.tokens = 0
        self._file: BinaryIO = self._staged.open("wb")

    def write(self, documents: Iterable[Any]) -> None:
        """Appends documents: sequences of tokens. Raises ValueError for a token that the dtype
        cannot hold."""
        lengths = []
        for document in documents:
            tokens = np.asarray(document, np.int64)
            most = np.iinfo(self._dtype).max
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() <= most:
                raise ValueError(f"a token is not in 0 to {most}: it does not fit {self._dtype}")
            self._file.write(tokens.astype(self._dtype).tobytes())
            lengths.append(len(tokens))
        self._lengths.append(np.array(lengths, np.int64))
        self.tokens += sum(lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._file.close()
            self._staged.unlink(missing_ok=True)

    def _commit(self) -> None:
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        if len(lengths) and lengths.max() >= 2**31:
            raise ValueError(f"a document has {lengths.max()} tokens: the format holds 2^31 - 1")
        code = next(c for c, name in DTYPES.items() if np.dtype(name) == self._dtype)
        starts = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        header = HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1)
        arrays = (
            lengths.astype("<i4"),
            starts.astype("<i8"),
            np.arange(len(lengths) + 1, dtype="<i8"),
        )
        self._file.flush()
        self._index.unlink(missing_ok=True)
        write_atomically(self._bin, self._staged.replace)
        content = header + b"".join(array.tobytes() for array in arrays)
        write_atomically(self._index, lambda staged: staged.write_bytes(content))


def _stem(path: Path) -> str:
    """The name without .bin or .idx; other dots stay."""
    return path.stem if path.suffix in (".bin", ".idx", ".npy") else path.name


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{path}: {size} bytes are not a multiple of {dtype.itemsize} ({dtype})")
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)


def _read_pair(path: Path, index: Path) -> tuple[np.ndarray, np.ndarray]:
    """`(tokens, ends of the documents)`."""
    size = index.stat().st_size
    content = np.memmap(index, np.uint8, "r") if size else np.empty(0, np.uint8)
    if size < HEADER.size or content[:9].tobytes() != MAGIC:
        raise ValueError(f"{index} is not an index of Megatron-LM")
    _, version, code, sequences, bounds = HEADER.unpack(content[: HEADER.size].tobytes())
    kind = np.dtype(f"<{DTYPES[code]}") if code in DTYPES else None
    if version != 1 or kind is None or kind.kind == "f":
        raise ValueError(f"{index}: version {version}, dtype {code}: expected 1, and integers")
    if size < HEADER.size + sequences * 12 + bounds * 8:
        raise ValueError(f"{index}: {size} bytes are too few for {sequences} sequences")
    at = HEADER.size
    lengths = np.frombuffer(content, "<i4", sequences, at)
    starts = np.frombuffer(content, "<i8", sequences, at + sequences * 4)
    documents = np.frombuffer(content, "<i8", bounds, at + sequences * 12)
    tokens = _mapped(path, kind)
    ends = np.cumsum(lengths, dtype=np.int64)
    if len(ends) and (ends[-1] > len(tokens) or (starts != (ends - lengths) * kind.itemsize).any()):
        raise ValueError(f"{path}: its sequences do not lie one after another as {index} says")
    return tokens, ends[documents[1:] - 1] if len(ends) else ends
