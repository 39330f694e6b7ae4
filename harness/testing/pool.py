"""A pool of gloo ranks: worker processes that are started once and run many test functions.

    with RankPool(2) as pool:
        assert pool.run(global_rank) == [0, 1]

A function is named by its module, which the workers import; arguments and results are pickled.
"""

import atexit
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from harness import distributed
from harness.launcher.environment import local_rank_variables
from harness.zero.startup import join

SECONDS_TO_START = 120.0
SECONDS_AFTER_A_FAILURE = 3.0


class RankError(Exception):
    """A function failed on some ranks; the message contains their tracebacks."""


class RankPool:
    """`world_size` processes in one gloo world, on this machine's CPUs.

    After a failure the ranks' state is unknown: they are killed, and started again when needed.
    Ranks of a pool that is never closed end with this process.
    """

    def __init__(self, world_size: int, timeout_s: float = 60.0):
        """`timeout_s` bounds each `run`, and every collective in it."""
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: TCPStore | None = None
        # A killed compilation leaves a lock, which must not block other processes.
        self._jit_cache = tempfile.TemporaryDirectory(prefix="harness-jit-")

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on each rank.

        Raises RankError if it raised on any rank, died, or took longer than `timeout_s`.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect(self.timeout_s)

    def _collect(self, timeout: float) -> list[Any]:
        """Waits for an answer of each rank."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < self.world_size:
            waiting = [
                p for r, p in enumerate(self._pipes) if r not in results and r not in failures
            ]
            ready = wait(waiting, timeout)
            for pipe in ready or waiting:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                ok, value = self._answer(rank) if ready else (False, "did not finish in time")
                (results if ok else failures)[rank] = value
            if failures:
                timeout = SECONDS_AFTER_A_FAILURE
        if failures:
            self.close()
            raise RankError("\n".join(f"rank {r}: {text}" for r, text in sorted(failures.items())))
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Kills the processes."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        atexit.register(self.close)  # as this process would wait for them, for ever
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["harness.testing.preload"])
        # The pool hosts the store itself, so no other process can take its port.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world_size):
            pipe, theirs = server.Pipe()
            identity = (rank, self.world_size, self._store.port)
            args = (theirs, identity, self.timeout_s, self._jit_cache.name, list(sys.path))
            # Not a daemon: daemons may not start data-loader workers.
            process = server.Process(target=_serve, args=args)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(pipe)
        self._collect(SECONDS_TO_START)

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join()
            return False, f"died with exit code {self._processes[rank].exitcode}"


def _serve(
    pipe: Connection,
    identity: tuple[int, int, int],
    timeout_s: float,
    jit_cache: str,
    path: Sequence[str],
) -> None:
    """A worker: joins the world, then runs the functions received through the pipe."""
    sys.path[:] = path
    rank, world_size, port = identity
    faulthandler.enable()
    # Data-loader workers must be children of this rank, so that they end with it.
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= local_rank_variables(rank, world_size, port) | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": jit_cache,
    }
    import torch

    torch.set_num_threads(1)
    distributed.init(timeout_s, join)
    pipe.send((True, None))
    while True:
        try:
            function, args = pipe.recv()
            answer = (True, function(*args))
        except EOFError:
            return
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
