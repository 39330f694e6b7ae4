"""What a run changes in its process, and how it was before: for runs in somebody else's program."""

import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.distributed.rng import rng_state, set_rng_state
from harness.errors import HarnessError

_run_in_progress = threading.Lock()


@contextmanager
def one_run() -> Iterator[None]:
    """Raises HarnessError if another run is in progress in this process: they would share its
    process group and its signal handlers."""
    if not _run_in_progress.acquire(blocking=False):
        raise HarnessError(
            "another run is in progress in this process: wait for its end, or start this one in "
            "processes of its own, with harness.launch"
        )
    try:
        yield
    finally:
        _run_in_progress.release()


@contextmanager
def restored() -> Iterator[None]:
    """After the context, as before it: environment variables, random generators, the log's
    handlers, warnings' filters, torch's threads and GPU, `sys.excepthook`, which torch wraps for
    each process group, and where modules are imported from.

    A task's modules are imported again by the next run. Memory of the run is freed.
    """
    environment, generators = dict(os.environ), rng_state()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    threads, path, modules = torch.get_num_threads(), list(sys.path), set(sys.modules)
    logger = logging.getLogger("harness")
    log = logger.level, logger.propagate, list(logger.handlers)
    excepthook = sys.excepthook
    try:
        with warnings.catch_warnings():
            yield
    finally:
        _forget_modules(set(sys.modules) - modules, set(sys.path) - set(path))
        sys.path[:], sys.excepthook = path, excepthook
        logger.setLevel(log[0])
        logger.propagate, logger.handlers = log[1:]
        torch.set_num_threads(threads)
        if gpu is not None:
            torch.cuda.set_device(gpu)  # whose generator was kept
        set_rng_state(generators)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        gc.collect()  # models and engines refer to themselves, and to sockets and threads
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _forget_modules(names: set[str], folders: set[str]) -> None:
    """Forgets the modules that were imported from folders of tasks."""
    for name in names:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and str(Path(file).parent) in folders:
            del sys.modules[name]
