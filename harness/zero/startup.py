"""Imports DeepSpeed, and patches it; here where its defaults would hang a run, or fail a second."""

import importlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any

import torch.distributed as dist

from harness import distributed
from harness.distributed import rendezvous
from harness.distributed.forks import sockets_close_in_forks
from harness.zero import leftovers
from harness.zero.patches import apply_patches


def join(timeout: timedelta) -> Callable[[], None]:
    """Makes torch's default process group through DeepSpeed, each collective bounded by `timeout`,
    unless there is one. Returns what leaves it again.

    For `distributed.init`. Blocks until all ranks have joined.
    """
    deepspeed = _patched(timeout)
    leave = partial(_leave, _groups(), deepspeed.comm.comm.cdb)
    deepspeed.init_distributed(timeout=timeout, verbose=False, init_method=rendezvous.URL)
    return leave


def _leave(groups: set[Any], backend: Any) -> None:
    """Destroys the process groups other than `groups`, and makes DeepSpeed forget them: what it
    keeps in its modules would otherwise be used by the next run in this process. `backend`: its
    own from before."""
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    if not groups:
        comm.destroy_process_group()
    for group in _groups() - groups:
        comm.destroy_process_group(group)
    comm.cdb = backend
    leftovers.forget()


def _groups() -> set[Any]:
    """torch's process groups of this process."""
    return set(dist.distributed_c10d._world.pg_map)


def _patched(timeout: timedelta) -> ModuleType:
    """DeepSpeed with the patches of patches.py, and two more.

    Its shared-memory op (comm/torch.py, build_shm_op) is for inference only, but is compiled on the
    first start of every CPU run: this takes a minute, or forever after a compilation was killed.
    And ZeRO's process groups (comm/torch.py, new_group) ignore the timeout and wait 30 minutes.
    torch.distributed.nn is imported before there is a process group: its functions would keep that
    one as their default, open, and of no use to the next run of this process.
    """
    importlib.import_module("torch.distributed.nn")
    os.environ.setdefault("DS_ACCELERATOR", distributed.device().type)
    deepspeed = importlib.import_module("deepspeed")
    # Set before it is asked for: DeepSpeed would run compilers to find out about all its ops.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend

    def new_group(self: Any, ranks: Sequence[int]) -> Any:
        with sockets_close_in_forks():
            return dist.new_group(list(ranks), timeout=timeout)

    backend.new_group = new_group
    apply_patches()
    return deepspeed
