"""Where copies run: on a GPU's copy streams, or synchronously on a CPU.

A backend provides streams, events and copies. All ordering between them is in `host_copy.py`, so
that a simulated backend can test it.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from typing import Any

import torch

from harness import devices

MARGIN = 0.1
"""The fraction of a device's memory that the planner leaves free, for fragmentation and for later
allocations by other libraries."""


class Backend(ABC):
    """Streams, events and copies of one kind of device. Streams and events are opaque."""

    device_type: str
    """Tensors on devices of this type are offloaded; others stay where they are."""

    @abstractmethod
    def compute(self, device: torch.device) -> Any:
        """The calling thread's current compute stream. Called at every use."""

    @abstractmethod
    def out(self, device: torch.device) -> Any:
        """The stream of the copies to host memory."""

    @abstractmethod
    def back(self, device: torch.device) -> Any:
        """The stream of the copies from host memory."""

    @abstractmethod
    def record(self, stream: Any) -> Any:
        """An event that completes when everything queued on the stream so far is done."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Makes later work on the stream wait for the event. Does not block."""

    def stall(self, stream: Any, event: Any) -> None:
        """`wait` on a compute stream, whose duration `stall_s` includes."""
        self.wait(stream, event)

    @abstractmethod
    def synchronize(self, event: Any) -> None:
        """Blocks until the event is complete."""

    @abstractmethod
    def copy(self, stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy on the stream. Does not block if the host memory is pinned."""

    def record_stream(self, stream: Any, tensor: torch.Tensor) -> None:  # noqa: B027  (optional)
        """Marks a tensor as used by a stream other than the one that allocated it."""

    def pin(self, size: int) -> torch.Tensor | None:
        """`size` bytes of host memory (uint8, 1-D) in separate pages; None if refused."""
        return devices.separate_pages(size)

    def unpin(self, memory: torch.Tensor) -> None:  # noqa: B027  (optional)
        """Undoes `pin`; the pages are freed with the tensor."""

    @abstractmethod
    def stall_s(self) -> float:
        """Seconds that compute has waited for copies, in waits that have completed."""

    @abstractmethod
    def headroom(self, device: torch.device) -> float:
        """Bytes that were free on the device at peak use, minus a margin."""


class CpuBackend(Backend):
    """Copies within host memory: saves nothing, but lets tests run everything else.

    Copies are synchronous, so nothing waits for them; their duration is the stall.
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
    """Two copy streams besides the compute stream, for each GPU of the process."""

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
        memory = devices.separate_pages(size)
        return memory if devices.pin(memory.untyped_storage()) else None

    def unpin(self, memory: torch.Tensor) -> None:
        devices.unpin(memory.untyped_storage())

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


def default_backend() -> Backend:
    """The backend for this process's GPU, or for its CPU if it computes there."""
    return CudaBackend() if devices.is_gpu_used() else CpuBackend()
