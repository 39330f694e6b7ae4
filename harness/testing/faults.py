"""Faults on demand: a rank that dies, or an operation that fails, in a named phase of a save.

    with fail_at("rename", step=100, rank=1):
        train(config)

The phases are functions of the product; a fault happens just before one of them does its work.
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
    "room": (save, "make_room"),
    "stage": (save, "write_files"),
    "file": (save, "write_file"),
    "manifest": (manifest.Manifest, "write"),
    "rename": (save, "put_in_place"),
    "latest": (save, "point_latest"),
    "prune": (retention, "remove"),
    "pruning": (retention.shutil, "rmtree"),
}


def die() -> None:
    """Kills this rank as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


def io_error() -> None:
    """Fails as a broken disk does."""
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
    """Makes `how` happen in a phase of this rank's saves.

    `step` and `path` (a part of the file's path) narrow down when; `rank` on which rank; each by
    default on any.
    """
    place, name = PHASES[phase]
    function = getattr(place, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        paths = " ".join(str(arg) for arg in args if isinstance(arg, Path))
        found = re.search(r"step-0*(\d+)", paths)
        at_step = step is None or (found is not None and int(found[1]) == step)
        if at_step and path in paths and rank in (None, distributed.global_rank()):
            how()
        return function(*args, **kwargs)

    with patch.object(place, name, faulty):
        yield


@contextmanager
def die_during_save(seconds: float, *, step: int, rank: int | None = None) -> Iterator[None]:
    """Kills this rank (or only `rank`) some time after the save of a step began.

    A run that ends sooner is killed at its end, and not whatever the rank does next.
    """
    fuse = threading.Timer(seconds, die)
    fuse.daemon = True
    kept = save.Saver.save

    def burning(self: save.Saver, *args: Any, **kwargs: Any) -> None:
        if self._engines.global_step == step and rank in (None, distributed.global_rank()):
            fuse.start()
        kept(self, *args, **kwargs)

    with patch.object(save.Saver, "save", burning):
        yield
        if fuse.is_alive():
            fuse.join()
