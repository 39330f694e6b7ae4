"""Host memory for copies: pinned slabs, reused, up to a limit of bytes."""

import threading
from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter
from typing import Any

import torch

from harness.offload.backends import Backend

PAGE = 4096

_size = attrgetter("size")


def size_class(size: int) -> int:
    """The bytes of a slab for `size` bytes: whole pages, eight classes an octave.

    So at most 12.5 % is unused, for sizes from 32 KiB on.
    """
    step = max(PAGE, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


class Slab:
    """A piece of host memory (uint8, 1-dim), and when the last copy that used it is done."""

    __slots__ = ("_like", "_view", "busy", "memory", "size")

    def __init__(self, memory: torch.Tensor):
        self.memory = memory
        self.size = memory.numel()
        self.busy: Any = None
        """Event of the last copy into it or out of it."""
        self._like: tuple[Any, ...] = ()
        self._view = memory

    def view(self, like: torch.Tensor) -> torch.Tensor:
        """Its first bytes as a dense tensor of the shape and dtype of `like`; in the same memory
        order, if `like` is dense, so that a copy is one transfer."""
        wanted = (like.shape, like.stride(), like.dtype)
        if self._like != wanted:
            stride = like.stride()
            if not like.is_contiguous():
                stride = torch.empty_like(like, device="meta").stride()
            flat = self.memory[: like.numel() * like.element_size()].view(like.dtype)
            self._like, self._view = wanted, flat.as_strided(like.shape, stride)
        return self._view


class Pool:
    """Slabs of `host_bytes` at most. Thread-safe; `give_back` may be called by a finalizer.

    A lease takes the smallest idle slab that is large enough, of whatever size class; no other
    choice is better, so a step with the demands of an earlier one never pins. Where no idle slab is
    large enough, a new one replaces the largest: the pool grows to the highest demand at one time,
    not to the sum over all sizes.
    """

    def __init__(self, backend: Backend, host_bytes: int):
        self.host_bytes = host_bytes
        self.held = 0
        """Bytes of all slabs: never more than `host_bytes`."""
        self.peak = 0
        """The most bytes that were leased at one time."""
        self.pins = 0
        """Slabs made so far."""
        self._backend = backend
        self._leased = 0
        self._idle: list[Slab] = []  # by size; of one size, the one that came back first
        self._returned: deque[Slab] = deque()
        self._lock = threading.Lock()

    def lease(self, size: int) -> Slab | None:
        """A slab of at least `size` bytes; None if `host_bytes` leaves no room."""
        with self._lock:
            self._collect()
            place = bisect_left(self._idle, size, key=_size)
            slab = self._idle.pop(place) if place < len(self._idle) else self._make(size)
            if slab is not None:
                self._leased += slab.size
                self.peak = max(self.peak, self._leased)
            return slab

    def give_back(self, slab: Slab) -> None:
        """Ends a lease. Takes no lock: the garbage collector may call it at any place."""
        self._returned.append(slab)

    @property
    def leased(self) -> int:
        """Bytes that are leased now."""
        with self._lock:
            self._collect()
            return self._leased

    def trim(self) -> None:
        """Frees every idle slab. Blocks until the copies that use them are done."""
        with self._lock:
            self._collect()
            while self._idle:
                self._free(self._idle.pop())

    def _collect(self) -> None:
        while self._returned:
            slab = self._returned.popleft()
            self._leased -= slab.size
            insort(self._idle, slab, key=_size)

    def _make(self, size: int) -> Slab | None:
        """A new slab, in the place of idle ones, which are all too small."""
        wanted = size_class(size)
        idle = sum(slab.size for slab in self._idle)
        if self.held - idle + wanted > self.host_bytes:
            return None
        if self._idle:
            self._free(self._idle.pop())
        while self.held + wanted > self.host_bytes:
            self._free(self._idle.pop())
        memory = self._backend.pin(wanted)
        if memory is None:  # the system has no more: stop asking
            self.host_bytes = self.held
            return None
        self.held += wanted
        self.pins += 1
        return Slab(memory)

    def _free(self, slab: Slab) -> None:
        if slab.busy is not None:
            self._backend.synchronize(slab.busy)
        self._backend.unpin(slab.memory)
        self.held -= slab.size
