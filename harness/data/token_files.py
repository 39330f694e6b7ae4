"""Corpora of tokens in files that are mapped into memory, as datasets; usable without harness.

    NAME.bin, NAME.idx   tokens, and where their documents end: Megatron-LM's format
                         (megatron/core/datasets/indexed_dataset.py), which `harness data prepare`
                         writes
    NAME.npy             a one-dimensional array of integers
    NAME.bin             bare tokens, uint16 unless said otherwise

Nothing is read before it is asked for, and processes of one machine share the pages.
"""

import fcntl
import os
import struct
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Of an index: magic, version, code of the dtype, sequences, boundaries of documents."""
DTYPES = dict(enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), start=1))
"""By code."""
SCANNED = 1 << 20
"""Tokens, or entries of an index, that are looked through at once."""


class TokenFile:
    """A corpus: `tokens`, 1-D of some integer dtype, and where its documents are. With an index it
    takes no memory; without one 8 bytes for each document."""

    def __init__(self, path: str | Path, *, dtype: str = "uint16", separator: int | None = None):
        """`path`: .npy, .bin, .idx, or the name of a pair of .bin and .idx without its suffix.
        `dtype`: of a .bin without .idx. `separator`: the token that ends each document, where no
        .idx says so; without it the file is one document.

        Raises FileNotFoundError, and ValueError for a file that is damaged or not such a corpus.
        """
        self._arguments = (path, dtype, separator)
        self.path = Path(path)
        index = self.path.with_name(f"{_stem(self.path)}.idx")
        self._index: _Index | None = None
        if self.path.suffix == ".npy":
            self.tokens = _loaded(self.path)
        elif index.is_file():
            self.path = index.with_suffix(".bin")
            self._index = _Index(index)
            self.tokens = _mapped(self.path, self._index.dtype)
            self._index.check(self.path, len(self.tokens))
            return
        else:
            if self.path.suffix != ".bin" or not self.path.is_file():
                raise FileNotFoundError(f"{path}: no such corpus: expected .npy, .bin, or .idx")
            self.tokens = _mapped(self.path, np.dtype(dtype))
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            shape, kind = list(self.tokens.shape), self.tokens.dtype
            raise ValueError(f"{self.path}: found {kind} {shape}, expected integers in 1 dimension")
        self._ends = self._scan(separator)

    @property
    def ends(self) -> np.ndarray:
        """The place after the last token of each document (int64), computed from the index."""
        return self._ends if self._index is None else self._index.ends()

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self._ends) if self._index is None else self._index.documents

    def span(self, document: int) -> tuple[int, int]:
        """Where a document's tokens begin and end."""
        if self._index is not None:
            return self._index.span(document)
        return int(self._ends[document - 1]) if document else 0, int(self._ends[document])

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
    """The documents of a corpus, each int64 [its length]."""

    def __init__(self, corpus: TokenFile):
        self.corpus = corpus

    @cached_property
    def lengths(self) -> np.ndarray:
        """Of each document (int64), for samplers and packers; 8 bytes a document once it is asked
        for."""
        return np.diff(self.corpus.ends, prepend=0)

    def __len__(self) -> int:
        return self.corpus.documents

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.corpus.slice(*self.corpus.span(index))


class TokenWriter:
    """Writes a pair of .bin and .idx, document by document.

    Both appear when the context ends without an error, the .idx last: a .bin that is replaced never
    has the .idx of another one. What a writer that was killed has left is overwritten.
    """

    def __init__(self, path: Path, dtype: Any):
        """`path`: with or without a suffix. `dtype`: uint8, uint16 or int32. Raises OSError,
        BlockingIOError if somebody else writes this pair now."""
        self._bin = path.with_name(f"{_stem(path)}.bin")
        self._index = self._bin.with_suffix(".idx")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths: list[np.ndarray] = []
        self.tokens = 0
        # The staged index is held, locked, until it is renamed.
        self._index_file = _locked(self._index)
        self._file: BinaryIO = _staged(self._bin).open("wb")

    def write(self, documents: Iterable[Any]) -> None:
        """Appends documents: sequences of tokens. Raises ValueError for a document that the format
        cannot hold, or a token that the dtype cannot."""
        written = list(documents)
        lengths = np.array([len(document) for document in written], np.int64)
        if (longest := lengths.max(initial=0)) >= 2**31:
            raise ValueError(f"a document has {longest} tokens: the format holds 2^31 - 1")
        empty, most = np.empty(0, self._dtype), np.iinfo(self._dtype).max
        tokens = np.concatenate([empty, *(document for document in written if len(document))])
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() <= most:
            raise ValueError(f"a token is not in 0 to {most}: it does not fit {self._dtype}")
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(lengths)
        self.tokens += len(tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        is_committed = False
        try:
            if kind is None:
                self._commit()
                is_committed = True
        finally:
            self._file.close()
            if not is_committed:
                _staged(self._bin).unlink(missing_ok=True)
                _staged(self._index).unlink(missing_ok=True)
            self._index_file.close()

    def _commit(self) -> None:
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        code = next(c for c, name in DTYPES.items() if np.dtype(name) == self._dtype)
        starts = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        self._index_file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        self._index_file.write(lengths.astype("<i4").tobytes())
        self._index_file.write(starts.astype("<i8").tobytes())
        self._index_file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        for file in (self._file, self._index_file):
            file.flush()
            os.fsync(file.fileno())
        self._index.unlink(missing_ok=True)
        _staged(self._bin).replace(self._bin)
        _staged(self._index).replace(self._index)


def _staged(path: Path) -> Path:
    """Where a file is written: always at the same place, so that what is left there goes."""
    return path.with_name(f".{path.name}.tmp")


def _locked(path: Path) -> BinaryIO:
    """The staged file of `path`, empty, and locked until it is closed."""
    file = _staged(path).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Else it was renamed between `open` and `flock`, and is somebody else's result.
        is_staged = os.path.samestat(os.fstat(file.fileno()), _staged(path).stat())
    except (BlockingIOError, FileNotFoundError):
        is_staged = False
    if not is_staged:
        file.close()
        raise BlockingIOError(f"{path}: another process is writing it")
    file.truncate(0)
    return file


def is_corpus(path: Path) -> bool:
    """Whether a file is of a pair of .bin and .idx."""
    index = path.with_suffix(".idx")
    if path.suffix not in (".bin", ".idx") or not index.is_file():
        return False
    with index.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _stem(path: Path) -> str:
    """The name without .bin or .idx; other dots stay."""
    return path.stem if path.suffix in (".bin", ".idx", ".npy") else path.name


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{path}: {size} bytes are not a multiple of {dtype.itemsize} ({dtype})")
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)


def _loaded(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an array of numpy: {error}") from None


class _Index:
    """Megatron-LM's .idx, mapped: a document is a row of sequences, perhaps an empty one. Raises
    ValueError if it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        content = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        if size < HEADER.size or content[:9].tobytes() != MAGIC:
            raise ValueError(f"{path} is not an index of Megatron-LM")
        _, version, code, sequences, bounds = HEADER.unpack(content[: HEADER.size].tobytes())
        dtype = np.dtype(f"<{DTYPES[code]}") if code in DTYPES else None
        if version != 1 or dtype is None or dtype.kind == "f":
            raise ValueError(f"{path}: version {version}, dtype {code}: expected 1, and integers")
        if size < HEADER.size + sequences * 12 + bounds * 8:
            raise ValueError(f"{path}: {size} bytes are too few for {sequences} sequences")
        self.dtype = dtype
        self.documents = max(0, bounds - 1)
        at = HEADER.size
        self._lengths = np.frombuffer(content, "<i4", sequences, at)
        self._starts = np.frombuffer(content, "<i8", sequences, at + sequences * 4)  # in bytes
        self._bounds = np.frombuffer(content, "<i8", bounds, at + sequences * 12)

    def check(self, tokens_path: Path, tokens: int) -> None:
        """Raises ValueError if it does not describe a .bin of so many tokens."""
        place = before = 0
        for first in range(0, len(self._lengths), SCANNED):
            lengths = self._lengths[first : first + SCANNED]
            ends = place + np.cumsum(lengths, dtype=np.int64)
            starts = (ends - lengths) * self.dtype.itemsize
            place = int(ends[-1])
            if (
                lengths.min() < 0
                or place > tokens
                or (self._starts[first:][:SCANNED] != starts).any()
            ):
                raise ValueError(
                    f"{tokens_path}: its sequences do not lie one after another as {self.path} says"
                )
        for first in range(0, len(self._bounds), SCANNED):
            bounds = np.concatenate([[before], self._bounds[first : first + SCANNED]])
            before = int(bounds[-1])
            is_first_wrong = not first and bounds[1] != 0
            if is_first_wrong or (np.diff(bounds) < 0).any() or before > len(self._lengths):
                raise ValueError(
                    f"{self.path}: its documents are not rows of its {len(self._lengths)} sequences"
                )

    def span(self, document: int) -> tuple[int, int]:
        """Where its tokens begin and end."""
        first, stop = self._bounds[document : document + 2].tolist()
        if first == stop:
            return 0, 0
        size = self.dtype.itemsize
        start, last = int(self._starts[first]) // size, int(self._starts[stop - 1]) // size
        return start, last + int(self._lengths[stop - 1])

    def ends(self) -> np.ndarray:
        """Of all documents, as `TokenFile.ends`."""
        places = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=places[1:])
        return places[self._bounds[1:]]
