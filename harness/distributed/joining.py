"""Joining and leaving the world."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from harness.distributed import background, network
from harness.distributed.collectives import all_gather, barrier
from harness.distributed.forks import sockets_close_in_forks
from harness.distributed.world import (
    device,
    free_port,
    global_rank,
    local_rank,
    local_world_size,
    set_control_group,
    use_device,
    world_size,
)
from harness.errors import ConfigError

Leave = Callable[[], None]

_leave: Leave | None = None


def init(timeout_s: float, join: Callable[[timedelta], Leave | None]) -> None:
    """Joins the world: creates the process group for tensors, and the control group.

    `timeout_s` bounds every collective. `join` creates torch's default process group with that
    timeout, and returns what `shutdown` calls to leave it; `zero.startup.join` does so through
    DeepSpeed. Without a launcher this is a world of one process. Blocks until all ranks have
    joined; if they have not a minute after `timeout_s`, ends the process.
    """
    global _leave
    timeout = timedelta(seconds=timeout_s)
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(single, MASTER_PORT=str(free_port()))
    if device().type == "cuda":
        _check_gpus()
    use_device()
    if local_world_size() < world_size():
        network.choose_interface()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    master = f"rank 0 at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    doing = f"rank {global_rank()} on {socket.gethostname()} joins {master}"
    with network.bounded(timeout_s + 60, doing), sockets_close_in_forks():
        _leave = join(timeout)
        with _lazy_connections():
            group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        set_control_group(group)
        barrier()  # connects each rank with its neighbours in the tree
    if device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_threads_of_this_rank())


def _check_gpus() -> None:
    """Raises ConfigError if this node's ranks do not have a GPU each."""
    ranks, gpus = max(local_world_size(), local_rank() + 1), torch.cuda.device_count()
    if ranks > gpus:
        raise ConfigError(
            f"rank {global_rank()} is one of {ranks} ranks on {socket.gethostname()} and sees "
            f"{gpus} GPU{'s' * (gpus != 1)}: start one rank per GPU, let each rank see all GPUs of "
            "its node (in Slurm --gpu-bind=none), or set DS_ACCELERATOR=cpu"
        )


def _threads_of_this_rank() -> int:
    """This rank's share of the CPU cores that it may run on. Collective."""
    processors = (socket.gethostname(), os.sched_getaffinity(0))
    return max(1, len(processors[1]) // all_gather(processors).count(processors))


@contextmanager
def _lazy_connections() -> Iterator[None]:
    """gloo connects two ranks when they first exchange a message, not all ranks with all."""
    name = "TORCH_GLOO_LAZY_INIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def shutdown() -> None:
    """Leaves the world."""
    global _leave
    background.close()
    set_control_group(None)
    leave, _leave = _leave, None
    if leave is not None:
        leave()
