"""Activations wait in host memory until backward: longer sequences and larger batches on a device.

    plan = offload.attach(model)             # the model's repeated blocks; it needs no change
    y = offload.checkpoint(block, x)         # or call by call
    with offload.saved_tensors(): ...        # or all that autograd saves, without recomputing

Usable alone: needs torch and psutil. docs/offload.md says what it does and what it costs.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from harness.offload.attach import (
    MIN_BYTES,
    Mode,
    OffloadPlan,
    attach,
    available_host_memory,
    repeated_class,
)
from harness.offload.regions import Inputs
from harness.offload.saved import CHUNK, Recorder, Store
from harness.offload.stats import Stats
from harness.offload.streams import default_backend

__all__ = [
    "Mode",
    "OffloadPlan",
    "Stats",
    "attach",
    "available_host_memory",
    "checkpoint",
    "repeated_class",
    "saved_tensors",
    "stats",
]


@functools.cache
def _store() -> Store:
    """What `checkpoint` and `saved_tensors` share in this process."""
    return Store(default_backend(), MIN_BYTES, available_host_memory() // 2)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, computed again in backward from inputs that wait in host memory.

    In the place of `torch.utils.checkpoint.checkpoint`, also as `activation_checkpoint_func` of
    DeepSpeed's PipelineModule. Without gradients it is the plain call.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return Inputs(function, args, kwargs).call(_store())


def saved_tensors() -> AbstractContextManager[Any]:
    """A context in which what autograd saves for backward waits in host memory.

    In the place of `torch.autograd.graph.save_on_cpu`. Backward may be called inside or outside.
    """
    return saved_tensors_hooks(Recorder(_store(), CHUNK).pack, Recorder.unpack)


def stats() -> Stats:
    """What `checkpoint` and `saved_tensors` have done in this process."""
    return _store().stats()
