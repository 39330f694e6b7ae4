"""Keeps activations in host memory until backward: longer sequences, larger batches.

    plan = offload.attach(model)             # the repeated blocks of an unchanged model
    y = offload.checkpoint(block, x)         # or call by call
    with offload.saved_tensors(): ...        # or all that autograd saves, without recomputation

Usable alone: no DeepSpeed, nothing of the trainer. docs/offload.md: how it works, what it costs.

    attachment.py           attach, OffloadPlan: offloads a model's blocks while it trains
    planner.py              how many blocks: all, a fraction, or what does not fit on the device
    checkpointing.py        calls whose inputs, or saved tensors, go to host memory
    saved_tensor_hooks.py   what autograd holds instead of a saved tensor, and when the tensor moves
    host_copy.py            one tensor's copy in host memory, and the seven waits that it needs
    pool.py                 reusable slabs of pinned host memory
    keep_on_device.py       which tensors stay on the device
    counters.py             OffloadStats: totals, for logs and metrics
    backends.py             streams, events and copies on a GPU or a CPU
    host_memory.py          how much host memory a rank may use
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from harness.offload.attachment import MIN_BYTES, Mode, OffloadPlan, attach
from harness.offload.backends import default_backend
from harness.offload.checkpointing import Inputs
from harness.offload.counters import OffloadStats
from harness.offload.host_memory import available_host_memory
from harness.offload.planner import Fraction
from harness.offload.saved_tensor_hooks import CHUNK, Recorder, Store
from harness.wrapper.blocks import repeated_class

__all__ = [
    "Fraction",
    "Mode",
    "OffloadPlan",
    "OffloadStats",
    "attach",
    "available_host_memory",
    "checkpoint",
    "repeated_class",
    "saved_tensors",
    "stats",
]


@functools.cache
def _store() -> Store:
    """The store that `checkpoint` and `saved_tensors` share in this process."""
    return Store(default_backend(), MIN_BYTES, available_host_memory() // 2)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, recomputed in backward from inputs kept in host memory.

    Replaces `torch.utils.checkpoint.checkpoint`, also as `activation_checkpoint_func` of
    DeepSpeed's PipelineModule. Without gradients it is a plain call.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return Inputs(function, args, kwargs).call(_store())


def saved_tensors() -> AbstractContextManager[Any]:
    """A context in which tensors that autograd saves for backward are kept in host memory.

    Replaces `torch.autograd.graph.save_on_cpu`. Backward may run inside or outside of it.
    """
    return saved_tensors_hooks(Recorder(_store(), CHUNK).pack, Recorder.unpack)


def stats() -> OffloadStats:
    """Totals of `checkpoint` and `saved_tensors` in this process."""
    return _store().stats()
