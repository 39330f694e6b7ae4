"""What is checked before a run starts, with a remedy for each mistake: the machine, and whether all
ranks run the same."""

import hashlib
import importlib.util
import logging
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

from harness import distributed
from harness.config import Config
from harness.data.workers import SHARED_MEMORY
from harness.errors import ConfigError
from harness.files import holder
from harness.utils import flattened

log = logging.getLogger(__name__)

FILES_OF_A_RANK, FILES_PER_RANK, FILES_PER_WORKER = 96, 6, 24
"""Open files of a process, of its connections to each other rank, and to each worker, with the
tensors that it hands over."""
_Values = tuple[int, dict[str, dict[str, int]]]
"""The first rank of some; by key the different values, as text, each with the first rank that has
it."""

SMALL_SHARED_MEMORY = 256 << 20
SECONDS_OF_A_STALE_LOCK = 600.0
SECONDS_OF_SKEW = 5.0


def check_open_files(workers: int) -> None:
    """Raises ConfigError if the limit of open files is too low for the ranks and this one's
    `workers`. Before the ranks join."""
    ranks = distributed.world_size()
    needed = FILES_OF_A_RANK + FILES_PER_RANK * ranks + FILES_PER_WORKER * workers
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ConfigError(
            f"rank {distributed.global_rank()} on {socket.gethostname()} may open {limit} files, "
            f"but {ranks} ranks with data.workers = {workers} need about {needed}: raise the limit "
            "before the start, with `ulimit -n 65536` for instance"
        )


def warn_if_in_use(run_dir: Path) -> None:
    """Warns, on rank 0, of a run that has the directory: this one locks it once its models are
    built, which may take minutes, and goes on from what the other has saved if that has ended."""
    if distributed.is_global_leader() and (owner := holder(run_dir / "control/lock")):
        log.warning(
            "%s is in use by %s: this start goes on from there if that has ended once models and "
            "data are built, and fails otherwise; until then `harness ctl` reaches the other run. "
            "`harness ctl %s quit` ends it, another run.name makes this one a run of its own",
            *(run_dir, owner, run_dir),
        )


def check_machine(workers: int) -> None:
    """Warns, once on each node, of a small shared memory, and of locks that stop compilations."""
    if distributed.local_rank() == 0:
        _warn_of_shared_memory(workers)
        _warn_of_stale_locks()


def _warn_of_shared_memory(workers: int) -> None:
    if not workers or not Path(SHARED_MEMORY).is_dir():
        return
    disk = shutil.disk_usage(SHARED_MEMORY)
    if disk.free < SMALL_SHARED_MEMORY:
        log.warning(
            "%s: %s has %d of %d MiB free, in which data.workers hand over batches: if they are "
            "large, enlarge it (docker run --shm-size=8g), or set data.workers = 0",
            *(socket.gethostname(), SHARED_MEMORY, disk.free >> 20, disk.total >> 20),
        )


def _warn_of_stale_locks() -> None:
    """A killed compilation of a torch extension leaves a lock, for which every later one waits."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    for lock in (*Path(root).glob("*/lock"), *Path(root).glob("*/*/lock")):
        age = time.time() - lock.stat().st_mtime
        if age > SECONDS_OF_A_STALE_LOCK:
            log.warning(
                "%s: %s is %d minutes old: a compilation that was killed has left it, and whoever "
                "needs that extension waits for it for ever: remove it, unless one is running",
                *(socket.gethostname(), lock, age // 60),
            )


def check_ranks_alike(config: Config) -> None:
    """Raises ConfigError, on all ranks, if they have other configs (except for paths), versions or
    code; warns if their clocks differ. Collective.

    Each node may have its own files: the config, DeepSpeed's JSON, the task, an environment.
    """
    settings: dict[str, Any] = dict(flattened(config.model_dump()))
    for name, engine in config.engines.items():
        settings |= flattened(engine.deepspeed(), f"engines.{name}.ds_config ")
    _raise_difference("the configs of the ranks differ", settings)
    _raise_difference("the ranks run different code", software(config))
    distributed.barrier()
    clocks = distributed.gather((time.time(), socket.gethostname())) or []
    for rank, (seconds, host) in enumerate(clocks):
        skew = seconds - clocks[0][0]
        if abs(skew) > SECONDS_OF_SKEW:
            log.warning(
                "the clock of rank %d on %s is %+.0f s from rank 0's: the log's times are not in "
                "order; synchronize them (NTP)",
                *(rank, host, skew),
            )


def software(config: Config) -> dict[str, str]:
    """What this rank runs: versions, and digests of harness's code and the task's file."""
    path = config.task.path
    is_module = not path.endswith(".py") and ":" not in path  # MODULE:NAME was given as an object
    spec = importlib.util.find_spec(path) if is_module else None
    file = Path(path) if spec is None else Path(spec.origin or "")
    of_task = _digest(file.read_bytes()) if file.is_file() else "no file"
    return _versions() | {f"the task {path}": of_task}


@cache
def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "deepspeed", "numpy", "safetensors")}
    files = sorted(Path(__file__).parent.rglob("*.py"))
    of_harness = _digest(*(file.read_bytes() for file in files))
    return found | {"python": platform.python_version(), "harness": of_harness}


def _digest(*texts: bytes) -> str:
    total = hashlib.blake2b(digest_size=8)
    for text in texts:
        total.update(text)
    return f"digest {total.hexdigest()}"


def _raise_difference(what: str, own: Mapping[str, Any]) -> None:
    """Raises ConfigError, on all ranks, if one of them has other values than rank 0. Collective."""
    rank = distributed.global_rank()
    texts = {key: "a path" if isinstance(v, Path) else repr(v) for key, v in own.items()}
    _, found = distributed.all_reduce((rank, {k: {t: rank} for k, t in texts.items()}), _both)
    with distributed.raise_on_all_ranks("config"):
        for key, (expected, *others) in sorted(found.items()):
            for text in others:
                where = f"on rank {found[key][text]}, and {expected} on rank 0"
                raise ConfigError(f"{what}: {key} is {text} {where}")


def _both(some: _Values, more: _Values) -> _Values:
    """The different values of two groups of ranks, the first group's first."""
    (rank, values), (other, others) = some, more
    found = {}
    for key in values | others:
        known, new = values.get(key, {"None": rank}), others.get(key, {"None": other})
        found[key] = known | {text: first for text, first in new.items() if text not in known}
    return rank, found
