"""What this process computes on, and what suits that device.

All that differs between a CPU and a GPU without being a kernel of its own is decided here: which
device it is, how large the pieces of some work are, and how host memory is pinned.
"""

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch


def is_gpu_used() -> bool:
    """Whether this process computes on a GPU: there is one, and DS_ACCELERATOR is not "cpu"."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


@dataclass(frozen=True)
class Limits:
    """Sizes of pieces of work. On a CPU a piece's intermediate results stay in its cache; on a GPU
    each piece costs the launches of its kernels, whatever its size."""

    tile_elements: int
    """Of a matrix that an optimizer steps."""
    counters: int
    """Of counter-based random numbers; about 300 bytes of intermediate results for each."""
    batch_bytes: int
    """Of random matrices that are generated together, if that is more than one."""
    cache_bytes: int
    """Of random matrices that an optimizer keeps; the others are generated at each step."""
    is_asynchronous: bool
    """Whether the host runs ahead, so that reading a value would make it wait."""


LIMITS = {
    "cpu": Limits(2**18, 2**14, 0, 64 * 2**20, is_asynchronous=False),
    "cuda": Limits(2**62, 2**22, 64 * 2**20, 2**30, is_asynchronous=True),
}
"""By type of device."""


def limits(device: torch.device) -> Limits:
    """The limits of a device; those of a GPU for every device that is not a CPU."""
    return LIMITS["cpu" if device.type == "cpu" else "cuda"]


def memory_in_use() -> dict[str, int]:
    """What uses the memory of this process's device, in bytes by what it is; empty without a GPU
    that has been used."""
    if not (is_gpu_used() and torch.cuda.is_initialized()):
        return {}
    free, total = torch.cuda.mem_get_info()
    stats = torch.cuda.memory_stats()
    tensors, reserved = stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
    return {
        "tensors": tensors,
        "tensors, most": stats["allocated_bytes.all.peak"],
        "torch's cache": reserved - tensors,
        "others": total - free - reserved,
        "free": free,
        "all": total,
    }


def separate_pages(size: int) -> torch.Tensor:
    """`size` bytes of host memory (uint8, 1-D) in pages that forked processes do not inherit."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)


def pin(memory: torch.UntypedStorage) -> bool:
    """Pins host memory for the GPUs, until `unpin`; False if the system refuses.

    torch's own pinned allocator rounds up to a power of two (pytorch #95823).
    """
    if int(_cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes(), 0)) == 0:
        _pinned.add(memory.data_ptr())
        return True
    _forget_error()
    return False


def unpin(memory: torch.UntypedStorage) -> None:
    """Undoes `pin`, before the memory is freed. Nothing happens if it was refused: CUDA's error
    would be that of the next kernel."""
    if memory.data_ptr() in _pinned:
        _pinned.remove(memory.data_ptr())
        _cudart().cudaHostUnregister(memory.data_ptr())


_pinned: set[int] = set()
"""Addresses."""


def _forget_error() -> None:
    """Makes the next kernel not report the error of a call before."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _cudart() -> Any:
    return torch.cuda.cudart()
