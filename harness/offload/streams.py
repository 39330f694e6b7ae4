"""Where copies run: on a GPU's own copy streams, or at once on a CPU.

A backend knows streams, events and copies. Which of them waits for which is not its business: the
rules are in `copies.py`, in one place, so that a simulated backend can test them.
"""

import mmap
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from typing import Any

import torch

MARGIN = 0.1
"""Part of a device's memory that the planner leaves alone: fragments, and what other libraries take
later."""


class Backend(ABC):
    """Streams, events and copies of one kind of device. Streams and events are opaque."""

    device_type: str
    """Tensors on devices of this type are offloaded; others are left where they are."""

    @abstractmethod
    def compute(self, device: torch.device) -> Any:
        """The stream that the calling thread computes on now. Asked at every use."""

    @abstractmethod
    def out(self, device: torch.device) -> Any:
        """The stream of the copies to host memory."""

    @abstractmethod
    def back(self, device: torch.device) -> Any:
        """The stream of the copies from host memory."""

    @abstractmethod
    def record(self, stream: Any) -> Any:
        """An event: all that was given to the stream up to now is done."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Lets what is given to the stream from now on wait for the event. Does not block."""

    def stall(self, stream: Any, event: Any) -> None:
        """`wait` of a compute stream, of which `stall_s` counts how long it took."""
        self.wait(stream, event)

    @abstractmethod
    def settle(self, event: Any) -> None:
        """Blocks until the event has come."""

    @abstractmethod
    def copy(self, stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Gives a copy to the stream. Does not block if the host's side is pinned."""

    def use(self, stream: Any, tensor: torch.Tensor) -> None:  # noqa: B027  (most have no allocator)
        """Tells the allocator that a stream uses a tensor which another stream allocated."""

    def pin(self, size: int) -> torch.Tensor | None:
        """`size` bytes of host memory (uint8, 1-dim) on pages of their own; None if refused."""
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A data-loader worker that is forked must neither copy nor charge these pages.
        memory.madvise(mmap.MADV_DONTFORK)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def unpin(self, memory: torch.Tensor) -> None:  # noqa: B027  (what is not pinned needs nothing)
        """Undoes what `pin` did; the pages go with the tensor."""

    @abstractmethod
    def stall_s(self) -> float:
        """Seconds that compute has waited for copies so far, as far as is known yet."""

    @abstractmethod
    def headroom(self, device: torch.device) -> float:
        """Bytes that were free on the device at the moment of its highest use, less a margin."""


class CpuBackend(Backend):
    """Host memory to host memory: saves nothing, and lets everything else be tested and trained.

    Copies are done at once, so there is nothing to wait for; what they take is the stall.
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

    def settle(self, event: Any) -> None:
        return None

    def copy(self, stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        started = time.perf_counter()
        destination.copy_(source)
        self._copying_s += time.perf_counter() - started

    def stall_s(self) -> float:
        return self._copying_s

    def headroom(self, device: torch.device) -> float:
        return float("inf")  # the host's memory is where it would go


class CudaBackend(Backend):
    """Two copy streams beside the compute stream, for every GPU of the process."""

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

    def settle(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def copy(
        self, stream: torch.cuda.Stream, destination: torch.Tensor, source: torch.Tensor
    ) -> None:
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)

    def use(self, stream: torch.cuda.Stream, tensor: torch.Tensor) -> None:
        tensor.record_stream(stream)

    def pin(self, size: int) -> torch.Tensor | None:
        # torch's own pinned allocator rounds up to a power of two (pytorch #95823).
        memory = super().pin(size)
        assert memory is not None
        if int(_cudart().cudaHostRegister(memory.data_ptr(), size, 0)) == 0:
            return memory
        with suppress(RuntimeError):  # else the next kernel would be blamed for the refusal
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
    """For the GPUs of this process, or for its CPU where there are none."""
    return CudaBackend() if torch.cuda.is_available() else CpuBackend()
