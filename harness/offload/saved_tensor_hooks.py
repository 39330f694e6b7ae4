"""What autograd holds instead of a saved tensor, and when the tensor moves.

The tensors of a region are fetched together: the inputs of one checkpointed call, or tensors that a
forward saved in sequence. Regions are chained in forward order: while backward works on one, the
previous one is being copied back. There are no reference counts or lists of live tensors: autograd
owns the handles, a handle owns its copy, and all other references are weak, so dropped graphs and
exceptions leave nothing behind.
"""

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from harness.offload.backends import Backend
from harness.offload.counters import OffloadStats
from harness.offload.host_copy import HostCopy
from harness.offload.keep_on_device import must_stay
from harness.offload.pool import Pool

WINDOW = 2
"""Maximum regions whose tensors are still on the device while they are copied out. Before a third
one, compute waits."""

CHUNK = 64 << 20
"""Bytes after which `saved_tensors` starts a new region."""


class Kept:
    """A tensor that stays on the device."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor):
        # Detached to avoid a reference cycle, except leaves: ZeRO may change a parameter's storage.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def tensor(self) -> torch.Tensor:
        """The tensor. Raises RuntimeError if it has been modified in place."""
        check_version(self._tensor, self._tensor._version, self._version)
        return self._tensor


class Handle:
    """A tensor that is in host memory, or being copied."""

    __slots__ = (
        "__weakref__",
        "_key",
        "_region",
        "_store",
        "_unpackings",
        "_version",
        "_version_sent",
        "consumed",
        "copy",
        "uses",
    )

    def __init__(
        self, store: "Store", region: "Region", key: Any, tensor: torch.Tensor, copy: HostCopy
    ):
        self.copy = copy
        self._key = key
        self._version = self._version_sent = tensor._version
        self.uses = 1
        """How many times autograd has saved it."""
        self.consumed = False
        """Whether backward has unpacked it as many times."""
        self._unpackings = 0
        self._store = store
        self._region = region
        ref = weakref.ref[Handle](self)
        region.add(ref, copy.size)
        store.known[key] = ref

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting():
            self._store.known.pop(self._key, None)
            self.copy.end()

    def is_in(self, region: "Region") -> bool:
        """Whether it belongs to `region`."""
        return self._region is region

    def tensor(self) -> torch.Tensor:
        """The tensor, on its device. Raises RuntimeError if it was modified before the copy."""
        store, copy = self._store, self.copy
        with store.lock:
            store.unpacked += 1
            if copy.source is not None:
                self._version_sent = copy.source._version
            check_version(copy, self._version_sent, self._version)
            if copy.source is not None:
                tensor = copy.source
            else:
                store.fetch(self, ahead=False)
                tensor = copy.take()
                self._unpackings += 1
                if self._unpackings == self.uses:
                    self._unpackings, self.consumed = 0, True
                    copy.drop()
            self._region.prefetch()
            return tensor

    def release(self) -> None:
        """Frees the tensor on the device once it has been copied.

        The copy may include a write made in the meantime: then backward must not use it.
        """
        if self.copy.source is not None:
            self._version_sent = self.copy.source._version
            self.copy.release()


class Region:
    """Handles that are fetched together, and the previous region."""

    __slots__ = ("__weakref__", "_handles", "_previous", "_store", "_touched", "size")

    def __init__(self, store: "Store", previous: "Region | None"):
        self.size = 0
        """Bytes."""
        self._store = store
        self._handles: list[weakref.ref[Handle]] = []
        self._previous = weakref.ref(previous) if previous is not None else None
        self._touched = False

    def add(self, handle: "weakref.ref[Handle]", size: int) -> None:
        """Adds a handle of `size` bytes."""
        self._handles.append(handle)
        self.size += size

    def handles(self) -> list[Handle]:
        """Its live handles."""
        return [handle for ref in self._handles if (handle := ref()) is not None]

    def prefetch(self) -> None:
        """At the first use in backward, fetches the rest of this region and the previous one."""
        if self._touched:
            return
        self._touched = True
        previous = self._previous() if self._previous is not None else None
        for handle in (*self.handles(), *(previous.handles() if previous is not None else ())):
            if not handle.consumed and handle.copy.source is None:
                self._store.fetch(handle, ahead=True)


class Recorder:
    """Packs the tensors that one call saves; `pack` and `unpack` are autograd's hooks for them."""

    __slots__ = ("_chunk", "_region", "_store")

    def __init__(self, store: "Store", chunk: float = float("inf")):
        """`chunk`: bytes after which a new region starts."""
        self._store = store
        self._chunk = chunk
        self._region: Region | None = None

    def pack(self, tensor: torch.Tensor) -> Kept | Handle:
        """What autograd keeps instead of a tensor."""
        store = self._store
        size = tensor.numel() * tensor.element_size()
        if size < store.min_bytes or must_stay(tensor, store.backend.device_type):
            return Kept(tensor)
        with store.lock:
            key = _key(tensor)
            ref = store.known.get(key)
            if ref is not None and (known := ref()) is not None:
                return self._reuse(known, tensor)
            slab = store.pool.lease(size)
            if slab is None:
                store.count.kept += 1
                return Kept(tensor)
            if self._region is None or self._region.size >= self._chunk:
                self._region = store.new_region()
            copy = HostCopy(store.backend, store.pool, slab, tensor.detach())
            store.count.bytes_out += size
            return Handle(store, self._region, key, tensor, copy)

    def _reuse(self, handle: Handle, tensor: torch.Tensor) -> Handle:
        """The handle of a tensor that was packed before. If several regions share the tensor, such
        as an attention mask, it stays on the device."""
        handle.uses += 1
        if self._region is None or not handle.is_in(self._region):
            handle.copy.keep(tensor.detach())
            self._store.count.kept += 1
        return handle

    @staticmethod
    def unpack(packed: Kept | Handle) -> torch.Tensor:
        """The packed tensor."""
        return packed.tensor()


class Store:
    """State shared by the regions of one plan, guarded by `lock`."""

    def __init__(self, backend: Backend, min_bytes: int, host_bytes: int):
        self.backend = backend
        self.min_bytes = max(1, min_bytes)
        self.pool = Pool(backend, host_bytes)
        self.count = OffloadStats()
        self.unpacked = 0
        """Tensors that backward has unpacked so far."""
        self.known: dict[Any, weakref.ref[Handle]] = {}
        """Handles by storage (a weak reference, so that a later one at the same address differs),
        view into it, and version."""
        self.lock = threading.RLock()
        self._window: deque[weakref.ref[Region]] = deque()

    def new_region(self) -> Region:
        """The next region of this forward. Regions older than the window leave the device."""
        previous = self._window[-1]() if self._window else None
        region = Region(self, previous)
        self._window.append(weakref.ref(region))
        while len(self._window) > WINDOW:
            self._release(self._window.popleft())
        return region

    def fetch(self, handle: Handle, ahead: bool) -> None:
        """Starts a tensor's copy back if it has not started. `ahead`: before it is needed."""
        copy = handle.copy
        if not ahead:
            self.count.prefetch_hits += copy.arriving is not None
            self.count.prefetch_misses += copy.arriving is None
        if copy.arriving is None:
            copy.fetch()
            self.count.bytes_in += copy.size

    def stats(self) -> OffloadStats:
        """Totals so far."""
        return replace(
            self.count,
            stall_s=self.backend.stall_s(),
            pins=self.pool.pins,
            pool_peak_bytes=self.pool.peak,
        )

    def drain(self) -> None:
        """Frees the device memory of regions in the window, and idle host memory.

        Blocks until its copies are done. Handles in existing graphs stay valid.
        """
        with self.lock:
            while self._window:
                self._release(self._window.popleft())
        self.pool.trim()

    @staticmethod
    def _release(ref: "weakref.ref[Region]") -> None:
        region = ref()
        for handle in region.handles() if region is not None else ():
            handle.release()


def check_version(tensor: torch.Tensor | HostCopy, version: int, expected: int) -> None:
    """Autograd's check, which it skips for tensors with hooks. Raises RuntimeError."""
    if version != expected:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{tensor.dtype} {list(tensor.shape)}] is at version {version}; expected "
            f"version {expected} instead"
        )


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        StorageWeakRef(tensor.untyped_storage()),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor._version,
    )
