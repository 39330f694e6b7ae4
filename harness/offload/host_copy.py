"""One tensor's copy in host memory, and the seven waits that keep it correct.

Copies out, copies back and compute run on three independent streams. Every ordering between them is
one `wait` in this file; tests/offload/test_streams.py removes each in turn, and fails if that goes
unnoticed.
"""

import torch

from harness.offload.backends import Backend
from harness.offload.pool import Pool, Slab


class HostCopy:
    """A tensor that is copied to host memory and back.

    It is on the device as `source` until `release`, and as `arriving` from `fetch` to `drop`.
    """

    __slots__ = (
        "_arrived",
        "_backend",
        "_host",
        "_pool",
        "_sent",
        "_slab",
        "_stream",
        "_stride",
        "_taken",
        "arriving",
        "device",
        "dtype",
        "shape",
        "size",
        "source",
    )

    def __init__(self, backend: Backend, pool: Pool, slab: Slab, source: torch.Tensor):
        """Starts the copy of `source` (detached, strided, no two elements at one address)."""
        self._backend = backend
        self._pool = pool
        self._slab: Slab | None = slab
        self.shape, self.dtype = source.shape, source.dtype
        self._stride = source.stride()
        self.device = source.device
        self.size = source.numel() * source.element_size()
        self.source: torch.Tensor | None = source
        self.arriving: torch.Tensor | None = None
        self._arrived = None
        self._taken = False
        self._host = slab.view(source)
        self._stream = backend.compute(self.device)
        out = backend.out(self.device)
        backend.wait(out, backend.record(self._stream))  # 1. the source has been computed
        if slab.busy is not None:
            backend.wait(out, slab.busy)  # 2. the slab's previous user is done
        backend.copy(out, self._host, source)
        self._sent = slab.busy = backend.record(out)

    def release(self) -> None:
        """Frees the source's device memory, unless `keep` was called."""
        if self.source is not None and self._slab is not None:
            self._backend.stall(self._stream, self._sent)  # 3. the source has been copied
            self.source = None

    def keep(self, source: torch.Tensor) -> None:
        """Keeps the source on the device from now on, and frees the host copy."""
        self.source = source
        self._give_back()

    def fetch(self) -> None:
        """Starts the copy back."""
        assert self._slab is not None
        backend, back = self._backend, self._backend.back(self.device)
        self._stream = backend.compute(self.device)
        self.arriving = torch.empty_strided(
            self.shape, self._stride, dtype=self.dtype, device=self.device
        )
        backend.wait(back, backend.record(self._stream))  # 4. the memory's previous user is done
        backend.wait(back, self._sent)  # 5. the copy out is complete
        backend.copy(back, self.arriving, self._host)
        self._arrived = self._slab.busy = backend.record(back)
        self._taken = False

    def take(self) -> torch.Tensor:
        """The fetched tensor, ready for compute to use."""
        assert self.arriving is not None
        compute = self._backend.compute(self.device)
        self._backend.stall(compute, self._arrived)  # 6. the copy back is complete
        if compute != self._stream:
            self._backend.record_stream(compute, self.arriving)
        self._taken = True
        return self.arriving

    def drop(self) -> None:
        """Frees the fetched tensor."""
        if self.arriving is not None and not self._taken:
            self._backend.wait(self._stream, self._arrived)  # 7. nothing writes to it any more
        self.arriving = None

    def end(self) -> None:
        """Frees everything. May be called by a finalizer, on any thread."""
        if self.source is not None:
            self._backend.wait(self._stream, self._sent)  # 3. again
            self.source = None
        self.drop()
        self._give_back()

    def _give_back(self) -> None:
        if self._slab is not None:
            self._pool.give_back(self._slab)
            self._slab = None
