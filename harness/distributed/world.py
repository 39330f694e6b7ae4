"""Who this process is among the ranks; joining and leaving the world.

There are two process groups: DeepSpeed's for tensors (NCCL on GPUs, gloo on CPUs), and the control
group, a gloo group for harness's own messages, so that they never queue behind gradients.
"""

import functools
import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from harness.devices import is_gpu_used
from harness.distributed import network
from harness.distributed.forks import sockets_close_in_forks
from harness.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

Leave = Callable[[], None]

_control: dist.ProcessGroup | None = None
_leave: Leave | None = None


def global_rank() -> int:
    """This process's rank in the world; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's rank on its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of ranks; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Number of ranks on this node (torchrun and `deepspeed` name it differently)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_global_leader() -> bool:
    """Whether this is rank 0."""
    return global_rank() == 0


def global_leader_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """Runs the function on rank 0 only; elsewhere it returns None."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return function(*args, **kwargs) if is_global_leader() else None

    return wrapper


def device() -> torch.device:
    """The device of this rank: its GPU, or the CPU if there is none or DS_ACCELERATOR=cpu."""
    if is_gpu_used():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def use_device() -> None:
    """Makes the calling thread, which begins with GPU 0, use this rank's GPU. Anything of CUDA in a
    thread without it takes some 500 MB of GPU 0 for each rank of the node."""
    if device().type == "cuda":
        torch.cuda.set_device(device())


def init(timeout_s: float, join: Callable[[timedelta], Leave | None]) -> None:
    """Joins the world: creates the process group for tensors, and the control group.

    `timeout_s` bounds every collective. `join` creates torch's default process group with that
    timeout, and returns what `shutdown` calls to leave it; `zero.startup.join` does so through
    DeepSpeed. Without a launcher this is a world of one process. Blocks until all ranks have
    joined; if they have not a minute after `timeout_s`, ends the process.
    """
    global _control, _leave
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
        group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    _control = group
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
    per_rank: list[object] = [None] * world_size()
    dist.all_gather_object(per_rank, processors, group=control_group())
    return max(1, len(processors[1]) // per_rank.count(processors))


def shutdown() -> None:
    """Leaves the world."""
    global _control, _leave
    _control = None
    leave, _leave = _leave, None
    if leave is not None:
        leave()


def free_port() -> int:
    """A TCP port that is currently free on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def control_group() -> dist.ProcessGroup:
    """The gloo group of all ranks for harness's own small messages. Call `init` first."""
    assert _control is not None, "harness.distributed.init() has not been called"
    return _control
