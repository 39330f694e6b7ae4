"""Where metrics are written: metrics.jsonl and TensorBoard."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from harness.errors import RunDirectoryGone
from harness.files import JsonLines, write_atomically

EVENT = "event"
"""The key of records that are not metrics, with what happened: `{"step": 5, "event": "export",
"text": PATH}`. Others are "save" and "command"; and "rollback": the run has returned to `step`, and
takes the steps after it again."""


@runtime_checkable
class Sink(Protocol):
    """A destination of records, on rank 0 only."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record, with its `step`: the metrics of a step, those of an evaluation, or an
        event, which has `EVENT`."""
        ...

    def close(self) -> None:
        """Flushes and closes."""
        ...


class JsonlSink:
    """metrics.jsonl: one object per line, of metrics only.

    A run that resumes at `step` first drops the records of later steps, which are written again,
    and lines that are not records, such as an incomplete last one; a run that starts over passes
    -1, which drops all.
    """

    def __init__(self, path: Path, step: int):
        self._directory = path.parent
        self._identity = _identity(path.parent)
        self._path = path
        self._lines: JsonLines | None = None
        self._truncate(step)

    def _truncate(self, step: int) -> None:
        self.close()
        if self._path.exists():
            lines = self._path.read_bytes().splitlines(keepends=True)
            remaining = b"".join(line for line in lines if _step_of(line) <= step)
            write_atomically(self._path, lambda staged: staged.write_bytes(remaining))
        self._lines = JsonLines(self._path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Raises RunDirectoryGone if the run's directory was deleted or moved meanwhile, and
        OSError if what a rollback drops cannot be dropped."""
        if EVENT in record:
            if record[EVENT] == "rollback":
                self._truncate(record["step"])
            return
        assert self._lines is not None
        self._lines.write(record)
        if _identity(self._directory) != self._identity:
            raise RunDirectoryGone(
                f"{self._directory}: this run's directory was deleted, moved or replaced while the "
                "run used it: what the run writes is lost, so it ends. Start it again; put the "
                "directory back first if it was moved"
            )

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def _identity(directory: Path) -> tuple[int, int]:
    """Device and inode; zeros if there is no such directory."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_dev, status.st_ino


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoardSink:
    """TensorBoard events: every value of a record at its step, and what happened as text. Needs
    `tensorboard`."""

    def __init__(self, directory: Path, step: int):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._open = partial(SummaryWriter, str(directory))
        self._writer = self._open(purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        if record.get(EVENT) == "rollback":
            self.close()
            self._writer = self._open(purge_step=record["step"] + 1)
        if EVENT in record:
            self._writer.add_text(record[EVENT], record["text"], record["step"])
            return
        for name, value in record.items():
            if name not in ("step", "time"):
                self._writer.add_scalar(name, value, record["step"], record.get("time"))

    def close(self) -> None:
        self._writer.close()
