"""Imports DeepSpeed, and patches it; here where its defaults would hang a run."""

import importlib
import os
from collections.abc import Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch.distributed as dist

from harness import distributed
from harness.distributed.forks import sockets_close_in_forks
from harness.zero.patches import apply_patches


def join(timeout: timedelta) -> None:
    """Makes torch's default process group through DeepSpeed, each collective bounded by `timeout`.

    For `distributed.init`. Blocks until all ranks have joined.
    """
    deepspeed = _patched(timeout)
    deepspeed.init_distributed(timeout=timeout, verbose=False)


def _patched(timeout: timedelta) -> ModuleType:
    """DeepSpeed with the patches of patches.py, and two more.

    Its shared-memory op (comm/torch.py, build_shm_op) is for inference only, but is compiled on the
    first start of every CPU run: this takes a minute, or forever after a compilation was killed.
    And ZeRO's process groups (comm/torch.py, new_group) ignore the timeout and wait 30 minutes.
    """
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
