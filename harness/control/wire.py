"""What a run and its clients share: where the socket is, and what is sent through it.

A client sends commands, one per line, and receives an `Answer` per line, as a JSON object. This
module must not import torch, so that `harness ctl` starts fast.
"""

import contextlib
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SOCKET = Path("control/control.sock")
"""Relative to the run directory."""
MAX_LINE = 64 * 1024
"""Most bytes of a command."""

CommandState = Literal["queued", "agreed", "done", "failed", "rejected"]
FINAL_STATES: tuple[CommandState, ...] = ("done", "failed", "rejected")


@dataclass(frozen=True)
class Answer:
    """The state of a command: queued, agreed at a step, then done or failed; or rejected."""

    id: int
    """The command's number in the audit log."""
    text: str
    """The command as it was sent."""
    state: CommandState
    step: int | None = None
    """The step after which it was agreed or executed."""
    result: str = ""
    """The result, or why the command failed or was rejected."""
    values: dict[str, Any] | None = None
    """What the result of `status` says, as numbers."""


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Another path of the same file, short enough for a socket address (107 bytes)."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def user_name(uid: int) -> str:
    """The name of a user of this machine, or the ID if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
