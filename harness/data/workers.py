"""A DataLoader's worker processes: how they start and end, and what helps if they fail."""

import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data._utils import worker as torch_worker

from harness.control.signals import leave_signals_to_parent
from harness.devices import is_gpu_used

SHARED_MEMORY = "/dev/shm"

SECONDS_TO_END = 5.0
"""What workers have to finish what they are reading."""


def loader_options(
    workers: int, start_method: str, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Arguments of a DataLoader, but for its data. `generator`: keeps the global one untouched."""
    return {
        "num_workers": workers,
        "multiprocessing_context": start_method if workers else None,
        "pin_memory": is_gpu_used(),
        "generator": generator or torch.Generator(),
        "worker_init_fn": leave_signals_to_parent,
    }


def act_as_worker(number: int | None) -> None:
    """Makes `torch.utils.data.get_worker_info()`, in this worker process, that of another worker;
    None: as if there were no workers."""
    info = torch_worker.get_worker_info()
    assert info is not None
    torch_worker._worker_info = (
        None
        if number is None
        else torch_worker.WorkerInfo(
            id=number, num_workers=info.num_workers, seed=info.seed, dataset=info.dataset
        )
    )


def note_remedy(error: Exception) -> None:
    """Notes below the traceback of an error what helps, if workers are known to fail like that."""
    if remedy := _remedy(str(error)):
        error.add_note(remedy)


def _remedy(text: str) -> str:
    """What helps against an error of a DataLoader with this message; empty if that is unknown."""
    if "Bus error" in text or ("No space left on device" in text and "/torch_" in text):
        disk = shutil.disk_usage(SHARED_MEMORY)
        return (
            f"workers hand batches over in {SHARED_MEMORY}, of which {disk.free >> 20} of "
            f"{disk.total >> 20} MiB are free: enlarge it (docker run --shm-size=8g, or mount -o "
            f"remount,size=8g {SHARED_MEMORY}), or set a smaller data.workers"
        )
    if "received 0 items of ancdata" in text or "Too many open files" in text:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"each tensor that a worker hands over is an open file, of which the limit is {limit}: "
            "raise it before the start, with `ulimit -n 65536` for instance"
        )
    if "killed by signal: Killed" in text or "exited unexpectedly" in text:
        return (
            "if nobody has killed the worker, the system has, for lack of memory (see dmesg): set "
            "a smaller data.workers, or let the dataset keep less in memory"
        )
    if "pickle" in text:
        return 'data.start_method = "fork", the default, starts workers without pickling anything'
    return ""


@contextmanager
def iterated(loader: Any) -> Iterator[Iterator[Any]]:
    """An iterator of a DataLoader, whose workers end with the context."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        end_workers(iterator)


def end_workers(iterator: Any) -> None:
    """Ends the workers of a DataLoader's iterator, if it has any, within seconds.

    Dropping the iterator does not suffice: the traceback of an exception may refer to it. And
    workers ignore the SIGTERM that Python sends at its exit, before it waits for them.
    """
    workers = getattr(iterator, "_workers", ())
    if not workers:
        return

    def kill() -> None:
        for worker in workers:
            worker.kill()

    timer = threading.Timer(SECONDS_TO_END, kill)
    timer.start()
    try:
        iterator._shutdown_workers()
    finally:
        timer.cancel()
        kill()
