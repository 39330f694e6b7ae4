"""The audit log, commands.jsonl: who sent which command, when, and its result."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.files import JsonLines


class Audit:
    """Appends one JSON object per answer to a command.

    A resumed run appends to the same file, whatever step it resumes from.
    """

    def __init__(self, path: Path):
        """Raises OSError if the file cannot be opened."""
        self._lines = JsonLines(path)
        with path.open(errors="replace") as file:
            self.last_id = max(map(_id_of, file), default=0)
            """The largest command number in the file."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record, with its `id`."""
        self._lines.write(record, digits=13)

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def _id_of(line: str) -> int:
    try:
        return int(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return 0
