"""Activations wait in host memory until backward: longer sequences and larger batches on a device.

    plan = offload.attach(model)             # the model's repeated blocks; it needs no change
    y = offload.checkpoint(block, x)         # or call by call
    with offload.saved_tensors(): ...        # or all that autograd saves, without recomputation

Usable alone: no DeepSpeed, nothing of the trainer. docs/offload.md says how it works and what it
costs.

    attachment.py    attach, OffloadPlan: a model's blocks, offloaded while it trains
    planner.py       how many of the blocks: all, a fraction, or what has no room on the device
    calls.py         calls that are recomputed from their inputs, or that save their tensors
    saved.py         what autograd holds in place of a saved tensor, and when that tensor moves
    copies.py        one tensor's copy in host memory, and the seven waits that keep it correct
    pool.py          slabs of pinned host memory, reused
    skip.py          which tensors stay on the device
    counters.py      Stats: what offloading has done, in numbers
    backends.py      streams, events and copies of a GPU, or of a CPU
    host_memory.py   how much host memory a rank may use
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from harness.offload.attachment import MIN_BYTES, Mode, OffloadPlan, attach
from harness.offload.backends import default_backend
from harness.offload.calls import Inputs
from harness.offload.counters import Stats
from harness.offload.host_memory import available_host_memory
from harness.offload.planner import Fraction
from harness.offload.saved import CHUNK, Recorder, Store
from harness.wrapper.blocks import repeated_class

__all__ = [
    "Fraction",
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

    Replaces `torch.utils.checkpoint.checkpoint`, also as `activation_checkpoint_func` of
    DeepSpeed's PipelineModule. Without gradients it is the plain call.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return Inputs(function, args, kwargs).call(_store())


def saved_tensors() -> AbstractContextManager[Any]:
    """A context in which what autograd saves for backward waits in host memory.

    Replaces `torch.autograd.graph.save_on_cpu`. Backward may be called inside or outside.
    """
    return saved_tensors_hooks(Recorder(_store(), CHUNK).pack, Recorder.unpack)


def stats() -> Stats:
    """What `checkpoint` and `saved_tensors` have done in this process."""
    return _store().stats()
