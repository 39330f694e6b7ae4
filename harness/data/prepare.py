"""Texts into a corpus of tokens: `harness data prepare`."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.data.token_files import TokenWriter, is_corpus
from harness.errors import ConfigError

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
"""What ends a document in well-known tokenizers, in the order in which it is looked for."""
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 22
"""A batch that is tokenized at once ends at either."""

Encode = Callable[[list[str]], list[np.ndarray]]
"""A batch of texts into the tokens of each, integers, with what ends a document."""


@dataclass(frozen=True)
class Options:
    """How texts become tokens."""

    tokenizer: str
    """A tokenizer.json, a folder that contains one, or "bytes"."""
    field: str = "text"
    """Field of .jsonl, column of .parquet and of data sets that holds the text."""
    lines: bool = False
    """Whether each line of a text file is a document, instead of the whole file."""
    glob: str = "*"
    """Names of the files that are read in folders."""
    eos: str | None = None
    """The token after each document; default: the tokenizer's, as of `END_TOKENS`; "": none."""


def prepare(
    sources: Sequence[Path], destination: Path, options: Options, report: Callable[[str], None]
) -> None:
    """Writes the texts of files and folders as DESTINATION.bin and .idx, all or nothing.

    Raises ConfigError for a wrong source, tokenizer or option, and OSError.
    """
    if not destination.name:
        raise ConfigError(f"{destination} is a folder: expected the name of a corpus in it")
    encode, vocabulary = load_tokenizer(options)
    files = [file for source in sources for file in files_of(source, options.glob)]
    dtype = "u1" if vocabulary <= 1 << 8 else "u2" if vocabulary <= 1 << 16 else "i4"
    total = sum(map(size_of, files))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="preparing") as bar,
        TokenWriter(destination, dtype) as writer,
        ThreadPoolExecutor(1) as encoder,
    ):
        documents = 0
        texts = chain.from_iterable(texts_of(file, options) for file in files)
        batches = batches_of(texts, bar.update)
        # A batch is tokenized, by all cores, while the one before is written.
        pending = encoder.submit(encode, next(batches, []))
        for batch in chain(batches, [[]]):
            encoded = pending.result()
            pending = encoder.submit(encode, batch)
            try:
                writer.write(encoded)
            except ValueError as error:
                raise ConfigError(f"{destination}: {error}") from None
            documents += len(encoded)
        if not documents:
            raise ConfigError(f"no texts in {', '.join(map(str, sources))}")
    report(
        f"{destination}: {documents:,} documents, {writer.tokens:,} tokens ({np.dtype(dtype)}) of "
        f"a vocabulary of {vocabulary:,}"
    )


def load_tokenizer(options: Options) -> tuple[Encode, int]:
    """`(how to encode a batch, size of the vocabulary: its greatest token + 1)`. Raises
    ConfigError."""
    if options.tokenizer == "bytes":
        end = b"" if options.eos == "" else b"\0"
        return lambda texts: [_bytes(text, end) for text in texts], 256
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError("tokenizers is not installed: pip install tokenizers") from None
    path = Path(options.tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--tokenizer: {path} does not exist: expected a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the only class that the library raises
        raise ConfigError(f"--tokenizer: {path}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = _end_token(tokenizer, path, options.eos)

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(tokens.ids + end, np.int64) for tokens in encoded]

    # Not `get_vocab_size`: numbers may be left out.
    return encode, max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1


def _bytes(text: str, end: bytes) -> np.ndarray:
    return np.frombuffer(text.encode() + end, np.uint8)


def _end_token(tokenizer: Any, path: Path, eos: str | None) -> list[int]:
    """The token that ends a document, or no token."""
    if eos == "":
        return []
    for name in END_TOKENS if eos is None else (eos,):
        if (token := tokenizer.token_to_id(name)) is not None:
            return [token]
    if eos is not None:
        raise ConfigError(f"--eos: {path} has no token {eos!r}")
    raise ConfigError(f"{path}: which token ends a document? Set --eos TOKEN, or --no-eos")


def files_of(source: Path, glob: str = "*") -> list[Path]:
    """The files of a source, in order: itself, or those below a folder, also through links, whose
    names match; hidden ones and corpora excepted.

    Raises ConfigError if there is none, and OSError for a folder that cannot be read.
    """
    if is_corpus(source):
        raise ConfigError(f"{source} is a corpus: expected texts")
    if source.is_file() or is_saved_dataset(source):
        return [source]
    if not source.is_dir():
        raise ConfigError(f"{source} does not exist")
    files = [file for file in _below(source, set()) if file.match(glob)]
    if not files:
        raise ConfigError(f"{source} has no files {glob}")
    return files


def _below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files in a folder, and in those below it that were not seen before."""
    if (folder / "dataset_dict.json").is_file():
        raise ConfigError(f"{folder} holds several data sets: prepare each of its folders")
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not is_saved_dataset(path):
            yield from _below(path, seen)
        elif not is_corpus(path):
            yield path


def is_saved_dataset(path: Path) -> bool:
    """Whether it is what `datasets.Dataset.save_to_disk` writes."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = path.glob("*.arrow") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def texts_of(path: Path, options: Options) -> Iterator[tuple[str, int]]:
    """`(text, bytes read for it)` of the documents in a file. Raises ConfigError, naming the place
    in the file, for what is not text."""
    if path.is_dir() or path.suffix == ".parquet":
        return _columns(path, options.field)
    if path.suffix in (".jsonl", ".ndjson"):
        return _records(path, options.field)
    return _texts(path, options.lines)


def _texts(path: Path, lines: bool) -> Iterator[tuple[str, int]]:
    if not lines:
        content = path.read_bytes()
        yield _decoded(content, str(path)), len(content)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _decoded(line.rstrip(b"\r\n"), f"{path}:{number}"), len(line)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text: {error}") from None


def _records(path: Path, name: str) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(_decoded(line, where))
                text = _field(record, name, where)
                text.encode()
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where} is not JSON: {error}") from None
            except UnicodeEncodeError as error:  # half of a pair, like "\\ud800"
                raise ConfigError(f"{where}: {name!r} is not Unicode text: {error}") from None
            yield text, len(line)


def _field(record: Any, name: str, where: str) -> str:
    if not isinstance(record, dict) or name not in record:
        known = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ConfigError(f"{where}: no field {name!r}; found {known}: set --field")
    if not isinstance(text := record[name], str):
        raise ConfigError(f"{where}: {name!r} is {type(text).__name__}, expected text")
    return text


def _columns(path: Path, name: str) -> Iterator[tuple[str, int]]:
    """The texts in a column of a .parquet, or of a saved data set."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise ConfigError(f"{path}: pyarrow is not installed: pip install pyarrow") from None
    try:
        if path.is_dir():
            for part in saved_parts(path):
                with ipc.open_stream(pyarrow.memory_map(str(part))) as stream:
                    _check_column(stream.schema.names, part, name)
                    yield from _column(stream, part, name)
        else:
            with parquet.ParquetFile(path) as file:
                _check_column(file.schema_arrow.names, path, name)
                yield from _column(file.iter_batches(columns=[name]), path, name)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _check_column(names: list[str], path: Path, name: str) -> None:
    if name not in names:
        raise ConfigError(f"{path}: no column {name!r}; found {names}: set --field")


def _column(batches: Iterable[Any], path: Path, name: str) -> Iterator[tuple[str, int]]:
    left = path.stat().st_size  # counted batch by batch, as far as known
    row = 0
    for batch in batches:
        values = batch.column(name).to_pylist()
        size = min(left, batch.nbytes)
        left -= size
        for number, text in enumerate(values):
            if not isinstance(text, str):
                what = f"{name!r} is {type(text).__name__}, expected text"
                raise ConfigError(f"{path}: row {row + number}: {what}")
            yield text, size if number == 0 else 0
        row += len(values)


def saved_parts(path: Path) -> list[Path]:
    """The files of a data set that `save_to_disk` wrote. Raises ConfigError if its rows are
    selected by another file: it would have to be written again."""
    state = json.loads((path / "state.json").read_text())
    if state.get("_indices_data_files"):
        raise ConfigError(f"{path}: a selection of rows: save its `flatten_indices()`")
    return [path / part["filename"] for part in state["_data_files"]]


def batches_of(
    texts: Iterable[tuple[str, int]], count: Callable[[int], object]
) -> Iterator[list[str]]:
    """Texts in batches. `count` is called with the bytes read."""
    batch: list[str] = []
    characters = 0
    for text, size in texts:
        count(size)
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
