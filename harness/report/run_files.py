"""The files of a run directory, as far as they have been written."""

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import not_
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from harness.errors import HarnessError
from harness.health import goodput
from harness.health.outcome import FILE as ENDED
from harness.health.outcome import Outcome

BYTES_AT_ONCE = 1 << 22
"""Of metrics.jsonl, whose records are in memory as dicts."""


_EVALUATED = re.compile("eval/")


class Columns:
    """Records as one float64 array per name, NaN where a record does not have it."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, dict[str, np.ndarray]]] = []
        self._joined: dict[str, np.ndarray] = {}

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records, whose values are numbers, or text like "nan"."""
        if not records:
            return
        rows: dict[tuple[str, ...], list[int]] = defaultdict(list)  # that have the same names
        for row, names in enumerate(map(tuple, records)):
            rows[names].append(row)
        chunk: dict[str, np.ndarray] = {}
        for names, some in rows.items():
            values = _matrix([records[row].values() for row in some], len(names))
            for name, column in zip(names, values.T, strict=True):
                whole = chunk.setdefault(name, np.full(len(records), np.nan))
                whole[some] = column
        self._chunks.append((len(records), chunk))
        self._joined = {}

    def __len__(self) -> int:
        return sum(size for size, _ in self._chunks)

    def names(self) -> list[str]:
        """All names, in the order in which they first appeared."""
        return list(dict.fromkeys(name for _, chunk in self._chunks for name in chunk))

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._joined:
            parts = [c.get(name, np.full(size, np.nan)) for size, c in self._chunks]
            self._joined[name] = np.concatenate(parts) if parts else np.empty(0)
        return self._joined[name]


def _matrix(rows: Sequence[Iterable[Any]], width: int) -> np.ndarray:
    try:  # also of text like "nan"
        flat = np.fromiter(chain.from_iterable(rows), np.float64, len(rows) * width)
    except (TypeError, ValueError):  # other text, or lists, of a task
        flat = np.array([_number(value) for row in rows for value in row])
    return flat.reshape(len(rows), width)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


@dataclass
class Metrics:
    """metrics.jsonl, read on from where it was read to before."""

    path: Path
    steps: Columns = field(default_factory=Columns)
    evaluations: Columns = field(default_factory=Columns)
    _inode: int = 0
    _offset: int = 0

    def refresh(self) -> None:
        """Reads what has been appended; everything, if a resume has replaced the file."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            inode = self.path.stat().st_ino
            if inode != self._inode or self.path.stat().st_size < self._offset:
                self.steps, self.evaluations, self._offset = Columns(), Columns(), 0
            self._inode = inode
            file.seek(self._offset)
            while block := file.read(BYTES_AT_ONCE):
                block += file.readline()
                block = block[: block.rfind(b"\n") + 1]  # without a line that is being written
                self._offset += len(block)
                self._add(parsed(block, "step"))

    def _add(self, records: Sequence[dict[str, Any]]) -> None:
        names = list(map(tuple, records))
        are_of = {some: any(map(_EVALUATED.match, some)) for some in set(names)}
        is_evaluation = [are_of[some] for some in names]
        self.evaluations.add(list(compress(records, is_evaluation)))
        self.steps.add(list(compress(records, map(not_, is_evaluation))))


def parsed(lines: bytes, needs: str) -> list[dict[str, Any]]:
    """The JSON objects of lines that have a key, without those that a crash has cut short."""
    try:  # at once, and by a parser that is three times as fast as the standard library's
        records = from_json(b"[" + lines.rstrip().replace(b"\n", b",") + b"]")
    except ValueError:
        records = [_json(line) for line in lines.splitlines()]
    return [record for record in records if isinstance(record, dict) and needs in record]


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class RunFiles:
    """A run directory. `refresh` reads what has been written since."""

    def __init__(self, path: Path):
        """Raises HarnessError if the path is not a run directory."""
        if not (path / "config.toml").is_file() and not (path / "metrics.jsonl").is_file():
            raise HarnessError(
                f"{path} is not a run directory: expected config.toml and metrics.jsonl in it, as "
                "in runs/NAME"
            )
        self.path = path
        self.metrics = Metrics(path / "metrics.jsonl")
        self.refresh()

    def refresh(self) -> None:
        """Reads on."""
        self.metrics.refresh()
        self.config_text = _text(self.path / "config.toml")
        try:
            self.config: dict[str, Any] = tomllib.loads(self.config_text)
        except tomllib.TOMLDecodeError as error:
            raise HarnessError(f"{self.path / 'config.toml'}: {error}") from None
        self.commands = parsed(_text(self.path / "commands.jsonl").encode(), "time")
        self.log = _text(self.path / "log.txt").splitlines()
        self.outcome = Outcome.read(self.path / ENDED)
        self.starts = [r for r in goodput.read(self.path / goodput.FILE) if "starting" in r]
        self.seconds_by_kind = goodput.seconds_by_kind(self.path / goodput.FILE)

    @property
    def settings(self) -> dict[str, Any]:
        """The config's values by their full keys, like `run.steps`."""
        return dict(_flat(self.config))

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config."""
        return self.settings.get(key, default)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
