"""Faults on demand: a rank that dies, or an operation that fails, in a named phase of a save.

    with fail_at("rename", step=100, rank=1):
        train(config)

The phases are functions of the product; a fault is injected just before one of them runs.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness import distributed
from harness.checkpoint import manifest, retention, save

PHASES: dict[str, tuple[Any, str]] = {
    "room": (save, "create_staging"),
    "stage": (save, "write_files"),
    "file": (save, "write_file"),
    "manifest": (manifest.Manifest, "write"),
    "rename": (save, "move_into_place"),
    "latest": (save, "write_latest"),
    "prune": (retention, "remove"),
    "pruning": (retention.shutil, "rmtree"),
}


def die() -> None:
    """Kills this rank with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def io_error() -> None:
    """Raises an I/O error, like a broken disk."""
    raise OSError(5, "Input/output error (injected)")


@contextmanager
def fail_at(
    phase: str,
    *,
    step: int | None = None,
    rank: int | None = None,
    path: str = "",
    how: Callable[[], None] = die,
) -> Iterator[None]:
    """Calls `how` in a phase of this rank's saves.

    `step`, `path` (a part of the file's path) and `rank` restrict it; by default it applies to any.
    """
    owner, name = PHASES[phase]
    function = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        paths = " ".join(str(arg) for arg in args if isinstance(arg, Path))
        match = re.search(r"step-0*(\d+)", paths)
        at_step = step is None or (match is not None and int(match[1]) == step)
        if at_step and path in paths and rank in (None, distributed.global_rank()):
            how()
        return function(*args, **kwargs)

    with patch.object(owner, name, faulty):
        yield


@contextmanager
def die_during_save(seconds: float, *, step: int, rank: int | None = None) -> Iterator[None]:
    """Kills this rank (or only `rank`) some seconds after the save of a step began.

    If the run ends sooner, it is killed at its end.
    """
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    original = save.Saver.save

    def save_and_die(self: save.Saver, *args: Any, **kwargs: Any) -> None:
        if self._engines.global_step == step and rank in (None, distributed.global_rank()):
            timer.start()
        original(self, *args, **kwargs)

    with patch.object(save.Saver, "save", save_and_die):
        yield
        if timer.is_alive():
            timer.join()
