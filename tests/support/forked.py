"""The entry point in ranks forked from a process that has imported everything, without a launcher.

They start in a second, and nobody ends them: how they end when one of them fails is their doing.
"""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.distributed import free_port
from tests.support.helpers import ROOT

TRAIN = str(ROOT / "launch/train.py")


def run_forked(world_size: int, words: Sequence[str], output: Path, limit_s: float) -> list[int]:
    """Runs the entry point on that many ranks until all have ended; their exit codes, by rank.

    `words`: its arguments. `output`: what all ranks write to the terminal. Ranks that are still
    there after `limit_s` are killed: their code is -9.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["harness.testing.preload"])
    port = free_port()
    ranks = [
        server.Process(target=_rank, args=(rank, world_size, port, list(words), str(output)))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + limit_s
    try:
        for process in ranks:
            process.join(max(0, end - time.monotonic()))
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in ranks]


def _rank(rank: int, world_size: int, port: int, words: list[str], output: str) -> None:
    multiprocessing.set_start_method("fork", force=True)
    with open(output, "a") as file:  # noqa: PTH123 (a path as text)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    sys.argv = [TRAIN, *words]
    runpy.run_path(TRAIN, run_name="__main__")
