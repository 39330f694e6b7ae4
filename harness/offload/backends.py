"""Where copies run: on a GPU's own copy streams, or immediately on a CPU.

A backend provides streams, events and copies. Which of them waits for which is decided in
`copies.py`, in one place, so that a simulated backend can test it.
"""

import mmap
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from typing import Any

import torch

MARGIN = 0.1
"""The fraction of a device's memory that the planner leaves free, for fragmentation and for what
other libraries allocate later."""


class Backend(ABC):
    """Streams, events and copies of one kind of device. Streams and events are opaque."""

    device_type: str
    """Tensors on devices of this type are offloaded; others stay where they are."""

    @abstractmethod
    def compute(self, device: torch.device) -> Any:
        """The stream that the calling thread computes on now. Called at every use."""

    @abstractmethod
    def out(self, device: torch.device) -> Any:
        """The stream of the copies to host memory."""

    @abstractmethod
    def back(self, device: torch.device) -> Any:
        """The stream of the copies from host memory."""

    @abstractmethod
    def record(self, stream: Any) -> Any:
        """An event that completes when all that was queued on the stream up to now is done."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Makes what is queued on the stream from now on wait for the event. Does not block."""

    def stall(self, stream: Any, event: Any) -> None:
        """`wait` of a compute stream; `stall_s` includes how long it took."""
        self.wait(stream, event)

    @abstractmethod
    def synchronize(self, event: Any) -> None:
        """Blocks until the event is complete."""

    @abstractmethod
    def copy(self, stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy on the stream. Does not block if the host memory is pinned."""

    def record_stream(self, stream: Any, tensor: torch.Tensor) -> None:  # noqa: B027  (optional)
        """Marks a tensor that another stream allocated as used by a stream."""

    def pin(self, size: int) -> torch.Tensor | None:
        """`size` bytes of host memory (uint8, 1-dim) in pages of their own; None if refused."""
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A forked data-loader worker must not inherit these pages.
        memory.madvise(mmap.MADV_DONTFORK)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def unpin(self, memory: torch.Tensor) -> None:  # noqa: B027  (optional)
        """Undoes `pin`; the pages are freed with the tensor."""

    @abstractmethod
    def stall_s(self) -> float:
        """Seconds that compute has waited for copies, as far as the waits have completed."""

    @abstractmethod
    def headroom(self, device: torch.device) -> float:
        """Bytes that were free on the device at its highest use, minus a margin."""


class CpuBackend(Backend):
    """Host memory to host memory: saves nothing, but runs everything else, for tests.

    Copies are synchronous, so there is nothing to wait for; their time is the stall.
    """

    device_type = "cpu"

    def __init__(self) -> None:
        self._copying_s = 0.0

    def compute(self, device: torch.device) -> None:
        return None

    def out(self, device: torch.device) -> None:
        return None

    def back(self, device: torch.device) -> None:
        return None

    def record(self, stream: Any) -> None:
        return None

    def wait(self, stream: Any, event: Any) -> None:
        return None

    def synchronize(self, event: Any) -> None:
        return None

    def copy(self, stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        started = time.perf_counter()
        destination.copy_(source)
        self._copying_s += time.perf_counter() - started

    def stall_s(self) -> float:
        return self._copying_s

    def headroom(self, device: torch.device) -> float:
        return float("inf")  # offloading would only move it within host memory


class CudaBackend(Backend):
    """Two copy streams besides the compute stream, for every GPU of the process."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._out: dict[torch.device, torch.cuda.Stream] = {}
        self._back: dict[torch.device, torch.cuda.Stream] = {}
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._waited_s = 0.0

    def compute(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def out(self, device: torch.device) -> torch.cuda.Stream:
        return self._stream(self._out, device)

    def back(self, device: torch.device) -> torch.cuda.Stream:
        return self._stream(self._back, device)

    def _stream(
        self, streams: dict[torch.device, torch.cuda.Stream], device: torch.device
    ) -> torch.cuda.Stream:
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        return streams[device]

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def stall(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(event)
        after.record(stream)
        self._waits.append((before, after))
        self._count_waits()

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def copy(
        self, stream: torch.cuda.Stream, destination: torch.Tensor, source: torch.Tensor
    ) -> None:
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)

    def record_stream(self, stream: torch.cuda.Stream, tensor: torch.Tensor) -> None:
        tensor.record_stream(stream)

    def pin(self, size: int) -> torch.Tensor | None:
        # torch's own pinned allocator rounds up to a power of two (pytorch #95823).
        memory = super().pin(size)
        assert memory is not None
        if int(_cudart().cudaHostRegister(memory.data_ptr(), size, 0)) == 0:
            return memory
        with suppress(RuntimeError):  # or the next kernel would report the refusal
            torch.zeros(1, device="cuda")
        return None

    def unpin(self, memory: torch.Tensor) -> None:
        _cudart().cudaHostUnregister(memory.data_ptr())

    def stall_s(self) -> float:
        self._count_waits()
        return self._waited_s

    def _count_waits(self) -> None:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._waited_s += before.elapsed_time(after) / 1000

    def headroom(self, device: torch.device) -> float:
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return total * (1 - MARGIN) - others - torch.cuda.max_memory_allocated(device)


def _cudart() -> Any:
    return torch.cuda.cudart()


def default_backend() -> Backend:
    """For this process's GPUs, or for its CPU where there are none."""
    return CudaBackend() if torch.cuda.is_available() else CpuBackend()
