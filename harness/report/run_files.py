"""The files of a run directory, as far as they have been written."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import HarnessError
from harness.health import goodput
from harness.health.outcome import FILE as ENDED
from harness.health.outcome import Outcome

LINES_AT_ONCE = 4_000
"""Records of metrics.jsonl that are in memory as dicts."""


class Columns:
    """Records as one float64 array per name, NaN where a record does not have it."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, dict[str, np.ndarray]]] = []
        self._joined: dict[str, np.ndarray] = {}

    def add(self, records: list[dict[str, Any]]) -> None:
        """Appends records, whose values are numbers, or text like "nan"."""
        if not records:
            return
        rows: dict[tuple[str, ...], list[int]] = {}  # of the records that have the same names
        for row, record in enumerate(records):
            rows.setdefault(tuple(record), []).append(row)
        chunk: dict[str, np.ndarray] = {}
        for names, some in rows.items():
            values = _matrix([list(records[row].values()) for row in some])
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


def _matrix(rows: list[list[Any]]) -> np.ndarray:
    try:
        return np.array(rows, dtype=np.float64)  # also of text like "nan"
    except (TypeError, ValueError):  # other text, or lists, of a task
        return np.array([[_number(value) for value in row] for row in rows])


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
            while lines := list(islice(file, LINES_AT_ONCE)):
                if not lines[-1].endswith(b"\n"):
                    lines.pop()  # being written
                self._offset += sum(map(len, lines))
                self._add(lines)
                if not lines:
                    break

    def _add(self, lines: list[bytes]) -> None:
        of_steps = [line for line in lines if b'"eval/' not in line]
        of_evaluations = [line for line in lines if b'"eval/' in line]
        self.steps.add(parsed(of_steps, "step"))
        self.evaluations.add(parsed(of_evaluations, "step"))


def parsed(lines: list[bytes], needs: str) -> list[dict[str, Any]]:
    """The JSON objects of lines that have a key, without those that a crash has cut short."""
    try:  # at once: half of the time
        records = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        records = [_json(line) for line in lines]
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
        commands = _text(self.path / "commands.jsonl").encode().splitlines()
        self.commands = parsed(commands, "time")
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
