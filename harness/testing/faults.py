"""Faults on demand: one rank fails in a named way, in a phase of a step. So the end of a run, and
its restart, can be rehearsed.

    with fail_at("forward", step=100, rank=1, kind="kill"):
        train(config)

In a job of a launcher the task's own code injects it, for as long as the process lives:

    def build(config):
        if fault := config.task.args.get("fault"):  # {phase = "forward", step = 100, rank = 1, ...}
            inject(**fault)

docs/reliability.md: what follows each fault. The phases are functions of harness; a fault is
injected just before one of them runs, and logged.
"""

import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from harness import distributed, execute
from harness.checkpoint import commit, export, manifest, neighbours, retention, save, transfer
from harness.checkpoint.neighbours import Neighbours
from harness.checkpoint.remote_store import Pace, Store
from harness.data.fetch import Fetch
from harness.engine import engine, engines
from harness.health import phases
from harness.zero import engine_state

log = logging.getLogger("harness.testing")

PHASES: dict[str, tuple[Any, str]] = {
    "data": (Fetch, "__getitem__"),  # in a worker, if there are any; counted in micro-batches
    "collate": (Fetch, "collated"),  # of the data
    "forward": (engines, "feed"),
    "backward": (engine.Engine, "backward"),
    "step": (engine_state, "take_step"),
    "evaluation": (engines.Engines, "evaluate"),
    "command": (execute, "_execute"),
    "export": (export, "_export_weights"),
    "save": (save, "write_files"),
    # of a save:
    "room": (save, "create_staging"),
    "stage": (save, "write_files"),
    "file": (commit, "write_file"),
    "manifest": (manifest.Manifest, "write"),
    "rename": (commit, "move_into_place"),
    "latest": (commit, "write_latest"),
    "prune": (retention, "remove"),
    "pruning": (retention.shutil, "rmtree"),
    # of an upload:
    "upload": (Store, "upload"),
    "part": (Pace, "wait"),  # of a file
    "uploaded": (Store, "write_manifest"),
    "forget": (Store, "remove"),
    "download": (Store, "download"),
    # of a copy on another node:
    "copy": (Neighbours, "copy_file"),
    "receive": (transfer, "receive"),
    "received": (transfer, "verify_file"),
    "safe": (neighbours, "mark_safe"),
}
IN_STEPS = ("forward", "backward", "step")
SECONDS_OF_SLOW = 3.0


def die() -> None:
    """Kills this process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stops this process with SIGSTOP."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """Never returns."""
    while True:
        time.sleep(3600)


def fail() -> None:
    """Raises an exception that is not harness's."""
    raise ValueError("injected")


def io_error() -> None:
    """Raises an I/O error, like a broken disk."""
    raise OSError(errno.EIO, "Input/output error (injected)")


def full_disk() -> None:
    """Raises the error of a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device (injected)")


def out_of_memory() -> None:
    """Raises the error of a device without free memory."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (injected)")


def additional_collective() -> None:
    """Calls a collective that the other ranks do not call."""
    torch.distributed.all_reduce(torch.ones(3, device=distributed.device()))


KINDS: dict[str, Callable[[], None]] = {
    "raise": fail,
    "exit": functools.partial(sys.exit, 7),
    "os._exit": functools.partial(os._exit, 7),
    "kill": die,
    "stop": stop,
    "hang": hang,
    "slow": functools.partial(time.sleep, SECONDS_OF_SLOW),
    "oom": out_of_memory,
    "io error": io_error,
    "full disk": full_disk,
    "collective": additional_collective,
}
NUMBERS = {"nan": float("nan"), "inf": float("inf"), "spike": 1000.0}
"""Kinds that change the loss, in "forward": it is multiplied."""


@contextmanager
def fail_at(
    phase: str,
    *,
    step: int | None = None,
    rank: int | None = None,
    path: str = "",
    kind: str | Callable[[], None] = "kill",
) -> Iterator[None]:
    """Lets a fault happen in a phase, one of `PHASES`, within the context.

    `kind`: one of `KINDS` or `NUMBERS`, or a function. `step`, `rank`, and `path` (a part of a
    file's path, for phases of a save) restrict it; by default it happens in each. Data is read
    ahead: there `step` is the number of a micro-batch of this rank, from 1 on. Raises ValueError
    for an unknown phase or kind.
    """
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}: expected one of {', '.join(PHASES)}")
    if not callable(kind) and kind not in KINDS and (kind not in NUMBERS or phase != "forward"):
        known = [*KINDS, *(f"{name} (forward only)" for name in NUMBERS)]
        raise ValueError(f"unknown kind {kind!r} in {phase!r}: expected one of {', '.join(known)}")
    owner, name = PHASES[phase]
    function = getattr(owner, name)

    @functools.wraps(function)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        paths = " ".join(str(arg) for arg in args if isinstance(arg, Path))
        is_here = rank in (None, distributed.global_rank()) and path in paths
        at = _step_of(phase, args, paths)
        if not (is_here and step in (None, at)) or (phase in IN_STEPS and not _is_training()):
            return function(*args, **kwargs)
        log.warning("fault injected: %s in %s of step %s", kind, phase, at)
        if isinstance(kind, str) and kind in NUMBERS:
            loss, stats = function(*args, **kwargs)
            return loss * NUMBERS[kind], stats
        act = KINDS[kind] if isinstance(kind, str) else kind
        if phase == "backward":
            args[1].register_hook(lambda _: act())  # within autograd
        else:
            act()
        return function(*args, **kwargs)

    with patch.object(owner, name, faulty):
        yield


def inject(phase: str, **details: Any) -> None:
    """`fail_at` for as long as this process lives."""
    _injected.enter_context(fail_at(phase, **details))


_injected = ExitStack()


def _step_of(phase: str, args: tuple[Any, ...], paths: str) -> int | None:
    if phase == "data":
        _, (number, _) = args
        return number + 1
    if match := re.search(r"step-0*(\d+)", paths):
        return int(match[1])
    return phases.now().step


def _is_training() -> bool:
    return phases.now().phase in IN_STEPS


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
