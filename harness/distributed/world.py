"""Who this process is among the ranks, and the group for their small messages.

There are two process groups: DeepSpeed's for tensors (NCCL on GPUs, gloo on CPUs), and the control
group, a gloo group for harness's own messages, so that they never queue behind gradients.
"""

import functools
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from harness.devices import is_gpu_used

P = ParamSpec("P")
T = TypeVar("T")

_control: dist.ProcessGroup | None = None
_tags: Iterator[int] = itertools.count()


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


def free_port() -> int:
    """A TCP port that is currently free on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def set_control_group(group: dist.ProcessGroup | None) -> None:
    """Of the world that this process joins; None as it leaves."""
    global _control, _tags
    _control, _tags = group, itertools.count()


def control_group() -> dist.ProcessGroup:
    """The gloo group of all ranks for harness's own small messages. Call `init` first."""
    assert _control is not None, "harness.distributed.init() has not been called"
    return _control


def next_tag() -> int:
    """A number for the messages of one exchange: the same on every rank, as all begin the same
    exchanges in the same order."""
    return next(_tags) % 2**31
