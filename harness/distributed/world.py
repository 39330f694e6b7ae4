"""Who this process is among the ranks, and how the ranks agree.

Two process groups are used: DeepSpeed's own for tensors (NCCL on GPUs, gloo on CPUs), and a gloo
group beside it for everything that harness itself says, so that control never queues behind
gradients.
"""

import functools
import importlib
import os
import random
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from harness.distributed import network
from harness.errors import HarnessError

P = ParamSpec("P")
T = TypeVar("T")

_control: dist.ProcessGroup | None = None


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
    """True on rank 0 of the world."""
    return global_rank() == 0


def is_local_leader() -> bool:
    """True on the first rank of each node."""
    return local_rank() == 0


def global_leader_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """Runs the function on rank 0 of the world alone; elsewhere it returns None."""
    return _only_if(is_global_leader, function)


def local_leader_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """Runs the function on the first rank of each node alone; elsewhere it returns None."""
    return _only_if(is_local_leader, function)


def _only_if(is_leader: Callable[[], bool], function: Callable[P, T]) -> Callable[P, T | None]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return function(*args, **kwargs) if is_leader() else None

    return wrapper


def device() -> torch.device:
    """The device of this rank: its GPU, or the CPU if there is none or DS_ACCELERATOR=cpu."""
    if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def init(timeout_s: float = 1800.0) -> None:
    """Joins the world: DeepSpeed's process group, and the control group beside it.

    Without a launcher this is a world of one process. `timeout_s` bounds every collective, those
    of ZeRO included. Blocks until all ranks have joined, and ends the process a minute after
    `timeout_s` if they have not.
    """
    global _control
    timeout = timedelta(seconds=timeout_s)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    if device().type == "cuda":
        torch.cuda.set_device(device())
    if local_world_size() < world_size():
        network.choose_interface()
    deepspeed = _deepspeed_with(timeout)
    where = f"rank 0 at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    doing = f"rank {global_rank()} on {socket.gethostname()} joins {where}"
    with network.bounded(timeout_s + 60, doing):
        deepspeed.init_distributed(timeout=timeout, verbose=False)
        group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    _control = group
    if device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_own_threads())


def _own_threads() -> int:
    """This rank's share of the processors that it may run on. Collective."""
    mine = (socket.gethostname(), os.sched_getaffinity(0))
    return max(1, len(mine[1]) // all_gather(mine).count(mine))


def _deepspeed_with(timeout: timedelta) -> Any:
    """DeepSpeed, imported and mended where its defaults would hang a run.

    Its shared-memory op serves only inference, but is compiled on the first start of every CPU run
    (a minute; for ever after a killed compilation). Its ZeRO groups ignore the timeout and wait 30
    minutes.
    """
    os.environ.setdefault("DS_ACCELERATOR", device().type)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    backend.new_group = lambda self, ranks: dist.new_group(list(ranks), timeout=timeout)
    return deepspeed


def shutdown() -> None:
    """Leaves the world."""
    global _control
    _control = None
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def control_group() -> dist.ProcessGroup:
    """The gloo group of all ranks for harness's own small messages. `init` must have run."""
    assert _control is not None, "harness.distributed.init() has not run"
    return _control


def all_reduce_max(vector: Sequence[int]) -> list[int]:
    """The largest value that any rank gave, place by place. Blocks until every rank has called."""
    flags = torch.tensor(vector, dtype=torch.int64)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=control_group())
    return flags.tolist()


class AsyncAllReduceMax:
    """`all_reduce_max` behind other work: started at one moment, harvested at a later one.

    It is part of every step: so it talks to the process group itself, and writes and reads its
    `size` numbers through numpy, which together take half the time of the usual calls.
    """

    def __init__(self, size: int = 1) -> None:
        self._flags = torch.zeros(size, dtype=torch.int64)
        self._numbers = self._flags.numpy()
        self._options = dist.AllreduceOptions()
        self._options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        self._work: dist.Work | None = None

    def start(self, vector: Sequence[int]) -> None:
        """Gives this rank's values. Every rank must call it at the same place."""
        self._numbers[:] = vector
        self._work = control_group().allreduce([self._flags], self._options)

    def harvest(self) -> list[int] | None:
        """What the ranks agreed on since `start`; None if it was not started. Blocks."""
        if self._work is None:
            return None
        self._work.wait()
        self._work = None
        return self._numbers.tolist()


def barrier() -> None:
    """Waits until every rank is here."""
    all_reduce_max([0])


def broadcast(value: T, source: int = 0) -> T:
    """The value that rank `source` has (any picklable object), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=control_group())
    return box[0]


def all_gather(value: T) -> list[T]:
    """Every rank's value (any picklable object), by rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


@contextmanager
def raise_on_all_ranks(doing: str) -> Iterator[None]:
    """Makes a failure on some ranks a failure on all, so that none is left waiting.

    The body must hold no collective, unless what fails in there fails on all ranks. If it raised
    anywhere, every rank raises the error of the first rank that failed: a HarnessError as it was,
    anything else with that rank's traceback.
    """
    failure: HarnessError | None = None
    try:
        yield
    except HarnessError as error:
        failure = error
    except OSError as error:
        failure = HarnessError(f"{doing}: {error}")
    except Exception:
        failure = HarnessError(f"{doing}:\n{traceback.format_exc()}")
    failures = all_gather(failure)
    for rank, found in enumerate(failures):
        if found is not None:
            error = found if all(failures) else type(found)(f"rank {rank}: {found}")
            error.agreed = True
            raise error


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch (every device) of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
