"""Host memory for copies: pinned slabs that are reused, up to a limit in bytes."""

import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter
from typing import Any

import torch

from harness.offload.backends import Backend

PAGE = 4096

_size = attrgetter("size")


def size_class(size: int) -> int:
    """Bytes of a slab for `size` bytes: full pages, with eight classes per power of two.

    So at most 12.5 % is unused for sizes >= 32 KiB.
    """
    step = max(PAGE, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


class Slab:
    """A block of host memory (uint8, 1-D), with an event for the last copy that uses it."""

    __slots__ = ("_like", "_view", "busy", "memory", "size")

    def __init__(self, memory: torch.Tensor):
        self.memory = memory
        self.size = memory.numel()
        self.busy: Any = None
        """Event of the last copy into or out of it."""
        self._like: tuple[Any, ...] = ()
        self._view = memory

    def view(self, like: torch.Tensor) -> torch.Tensor:
        """Its first bytes as a dense tensor with the shape and dtype of `like`, in the same memory
        order if `like` is dense, so that a copy is one transfer."""
        layout = (like.shape, like.stride(), like.dtype)
        if self._like != layout:
            stride = like.stride()
            if not like.is_contiguous():
                stride = torch.empty_like(like, device="meta").stride()
            flat = self.memory[: like.numel() * like.element_size()].view(like.dtype)
            self._like, self._view = layout, flat.as_strided(like.shape, stride)
        return self._view


class Pool:
    """Slabs of at most `host_bytes`. Thread-safe; `give_back` may be called by a finalizer.

    A lease takes the smallest idle slab that is large enough, of any size class. That is optimal,
    so a step with the demands of an earlier one never pins. If no idle slab is large enough, a new
    one replaces the largest: the pool grows to the peak demand, not to the sum over all sizes.
    """

    def __init__(self, backend: Backend, host_bytes: int):
        self.host_bytes = host_bytes
        self.held = 0
        """Bytes of all slabs, at most `host_bytes`."""
        self.peak = 0
        """Peak bytes leased."""
        self.pins = 0
        """Slabs allocated so far."""
        self._backend = backend
        self._leased = 0
        self._idle: list[Slab] = []  # sorted by size, then by time of return
        self._returned: deque[Slab] = deque()
        self._slabs: dict[int, Slab] = {}  # all of them, by address
        # A pool without leases may be dropped; pages must not be freed while they are pinned.
        weakref.finalize(self, _free_all, backend, self._slabs).atexit = False
        self._lock = threading.Lock()

    def lease(self, size: int) -> Slab | None:
        """A slab of at least `size` bytes; None if `host_bytes` leaves no space."""
        with self._lock:
            self._collect()
            index = bisect_left(self._idle, size, key=_size)
            slab = self._idle.pop(index) if index < len(self._idle) else self._allocate(size)
            if slab is not None:
                self._leased += slab.size
                self.peak = max(self.peak, self._leased)
            return slab

    def give_back(self, slab: Slab) -> None:
        """Ends a lease. Takes no lock, because the garbage collector may call it at any point."""
        self._returned.append(slab)

    @property
    def leased(self) -> int:
        """Bytes currently leased."""
        with self._lock:
            self._collect()
            return self._leased

    def trim(self) -> None:
        """Frees all idle slabs. Blocks until the copies that use them are done."""
        with self._lock:
            self._collect()
            while self._idle:
                self._free(self._idle.pop())

    def _collect(self) -> None:
        while self._returned:
            slab = self._returned.popleft()
            self._leased -= slab.size
            insort(self._idle, slab, key=_size)

    def _allocate(self, size: int) -> Slab | None:
        """A new slab that replaces idle ones, all of which are too small."""
        size = size_class(size)
        idle = sum(slab.size for slab in self._idle)
        if self.held - idle + size > self.host_bytes:
            return None
        if self._idle:
            self._free(self._idle.pop())
        while self.held + size > self.host_bytes:
            self._free(self._idle.pop())
        memory = self._backend.pin(size)
        if memory is None:  # the system refuses more: stop asking
            self.host_bytes = self.held
            return None
        self.held += size
        self.pins += 1
        slab = self._slabs[memory.data_ptr()] = Slab(memory)
        return slab

    def _free(self, slab: Slab) -> None:
        _release(self._backend, self._slabs.pop(slab.memory.data_ptr()))
        self.held -= slab.size


def _release(backend: Backend, slab: Slab) -> None:
    if slab.busy is not None:
        backend.synchronize(slab.busy)
    backend.unpin(slab.memory)


def _free_all(backend: Backend, slabs: dict[int, Slab]) -> None:
    while slabs:
        _release(backend, slabs.popitem()[1])
