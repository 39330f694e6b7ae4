"""What a run and `harness ctl` have in common: where the socket is, and what is said through it.

A client sends lines, each a command, and gets lines, each an `Answer` as a JSON object. Nothing
here imports torch: `harness ctl` answers at once.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SOCKET = Path("control/control.sock")
"""Below the run directory."""
LONGEST_LINE = 64 * 1024
"""Bytes of a command."""

State = Literal["queued", "agreed", "done", "failed", "rejected"]
LAST: tuple[State, ...] = ("done", "failed", "rejected")


@dataclass(frozen=True)
class Answer:
    """What becomes of a command: queued, agreed at a step, and then done or failed; or rejected."""

    id: int
    """Its number in the history of the run directory."""
    text: str
    """The command, as it was given."""
    state: State
    step: int | None = None
    """The step at whose end it was agreed or obeyed."""
    result: str = ""
    """What it led to, or why it failed or was rejected."""


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name of the same file that fits into a socket's address, which holds 107 bytes."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
