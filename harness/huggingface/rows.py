"""Rows of text files, JSONL, Parquet, and data sets that `datasets` has saved on disk."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.data.prepare import files_of, is_saved_dataset, saved_parts
from harness.errors import ConfigError

Row = Mapping[str, Any]


def read_rows(path: Path) -> Sequence[Row]:
    """The rows of a file or folder, in order.

    `.jsonl`: an object a line; `.parquet`, and a folder of `Dataset.save_to_disk`: their columns,
    mapped into memory (extra: data); any other file: its text, {"text": ...}. Of another folder
    the rows of all files. Raises ConfigError.
    """
    if is_saved_dataset(path) or path.suffix == ".parquet":
        return Table(path)
    rows: list[Row] = []
    for file in files_of(path):
        is_table = file.is_dir() or file.suffix == ".parquet"
        rows.extend(Table(file) if is_table else _rows_of(file))
    if not rows:
        raise ConfigError(f"{path} has no rows")
    return rows


def _rows_of(file: Path) -> Iterator[Row]:
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}") from None
    if file.suffix not in (".jsonl", ".ndjson"):
        yield {"text": text}
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{file}:{number}: a {type(row).__name__}, expected an object")
        yield row


class Table(Sequence[Row]):
    """The rows of a Parquet file, or of a data set that `Dataset.save_to_disk` wrote."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            from pyarrow import ipc, parquet
        except ImportError:
            raise ConfigError(f"{path}: pyarrow is not installed: pip install pyarrow") from None
        try:
            if path.is_dir():
                parts = [ipc.open_stream(pyarrow.memory_map(str(p))) for p in saved_parts(path)]
                self._table = pyarrow.concat_tables([part.read_all() for part in parts])
            else:
                self._table = parquet.read_table(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        if not self._table.num_rows:
            raise ConfigError(f"{path} has no rows")

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._table.slice(index, 1).to_pylist()[0]
