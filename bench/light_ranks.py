"""Many ranks on this machine that have nothing but the control group: no DeepSpeed, no model."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # the backend "fake"

from harness import distributed
from harness.launcher.environment import local_rank_variables

SECONDS = 300.0


def run(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of so many ranks. Raises RuntimeError if one fails."""
    context = multiprocessing.get_context("fork")
    port = distributed.free_port()
    answers: Any = context.SimpleQueue()
    processes = [
        context.Process(target=_serve, args=(rank, ranks, port, answers, function, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get() for _ in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failed := [text for is_ok, text in found.values() if not is_ok]:
        raise RuntimeError(failed[0])
    return [found[rank][1] for rank in range(ranks)]


def _serve(
    rank: int, ranks: int, port: int, answers: Any, function: Callable[..., Any], args: Any
) -> None:
    os.environ |= local_rank_variables(rank, ranks, port) | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        distributed.init(SECONDS, _join)
        answer = True, function(*args)
    except BaseException:
        answer = False, traceback.format_exc()
    answers.put((rank, answer))
    threading.Event().wait()  # until it is killed: its sockets stay open


def _join(timeout: timedelta) -> None:
    """A default group that connects to nobody."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, ranks = distributed.global_rank(), distributed.world_size()
    store = TCPStore(host, port, None, rank == 0, timeout, wait_for_workers=False)
    dist.init_process_group("fake", store=store, rank=rank, world_size=ranks)


def connections() -> int:
    """The open connections of this process to others, but for the store's."""
    import psutil

    port = int(os.environ["MASTER_PORT"])
    found = psutil.Process().net_connections("tcp")
    connected = [each for each in found if each.status == psutil.CONN_ESTABLISHED]
    return sum(port not in (each.laddr.port, each.raddr.port) for each in connected)
