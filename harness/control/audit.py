"""commands.jsonl: who told the run what, when, and what became of it."""

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.io import json_line

log = logging.getLogger(__name__)


class Audit:
    """Appends one object for each thing that becomes of a command. Any thread may write.

    It is history: a run that resumes goes on after what is there, whatever step it starts from.
    A record that cannot be written is told, and the run goes on.
    """

    def __init__(self, path: Path):
        """Raises OSError if the file cannot be opened."""
        self.last_id = 0
        """The largest number that a command has had in this file."""
        self._lock = threading.Lock()
        self._file = path.open("a+", buffering=1)
        self._file.seek(0)
        line = ""
        for line in self._file:
            self.last_id = max(self.last_id, _id_of(line))
        if line and not line.endswith("\n"):  # a crash has cut it off
            self._file.write("\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record, with its `id`."""
        try:
            with self._lock:
                self._file.write(json_line(record, digits=13) + "\n")
        except OSError as error:
            log.error("%s: %s", self._file.name, error)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _id_of(line: str) -> int:
    try:
        return int(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return 0
