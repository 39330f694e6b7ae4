"""What a run and its clients share: where the socket is, and what is sent through it.

A client sends lines, each a command, and receives lines, each an `Answer` as a JSON object. This
module must not import torch: `harness ctl` starts at once.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SOCKET = Path("control/control.sock")
"""Relative to the run directory."""
MAX_LINE = 64 * 1024
"""Bytes of a command."""

State = Literal["queued", "agreed", "done", "failed", "rejected"]
FINAL_STATES: tuple[State, ...] = ("done", "failed", "rejected")


@dataclass(frozen=True)
class Answer:
    """The state of a command: queued, agreed at a step, then done or failed; or rejected."""

    id: int
    """The command's number in the run directory's history."""
    text: str
    """The command as it was sent."""
    state: State
    step: int | None = None
    """The step after which it was agreed or executed."""
    result: str = ""
    """The result, or why the command failed or was rejected."""


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Another name of the same file that fits into a socket's address, of at most 107 bytes."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
