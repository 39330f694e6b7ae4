"""A device with copy streams, simulated on a CPU, for tests of activation offload.

Compute is eager, copies are not: each is done at a random time that the waits allow, or as late as
possible. Memory that has not been copied yet is NaN. In addition, vector clocks (Mattern 1989,
"Virtual Time and Global States of Distributed Systems") detect every access that no wait orders,
even if it happened to be harmless.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from harness.offload.backends import Backend

COMPUTE, OUT, BACK = "compute", "out", "back"

Clock = dict[str, int]
Wait = tuple[str, str] | tuple[str, str, str]


@dataclass
class _Copy:
    """A copy enqueued on a stream."""

    stream: str
    number: int
    after: Clock
    """Operations ordered before it, and itself."""
    do: Callable[[], None]
    memory: StorageWeakRef
    """The storage on the device's side."""
    owner: str
    """The stream to which this storage is returned."""
    done: bool = False

    def is_before(self, clock: Clock) -> bool:
        """Whether the owner of this clock knows that the copy is done."""
        return clock[self.stream] >= self.number


@dataclass
class _Host:
    """The copies that used a block of host memory since it was last written."""

    written: _Copy | None = None
    read: list[_Copy] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """Operations that are done when it has completed, and the stream that recorded it."""

    stream: str
    clock: Clock


class SimBackend(Backend):
    """`eagerness`: the probability that a possible copy is done; 0: as late as possible.

    `without` names waits to skip: the waiting and the awaited stream, and "wait" or "stall" for
    only one kind. `current` is the name of the compute stream; several compute streams are not
    synchronized with each other. `violations` lists accesses that no wait orders.
    """

    device_type = "cpu"

    def __init__(self, seed: int = 0, eagerness: float = 0.3, without: Wait | None = None) -> None:
        self.current = COMPUTE
        self.room = 0.0
        """What `headroom` returns."""
        self.violations: list[str] = []
        self._random = random.Random(seed)
        self._eagerness = eagerness
        self._without = without
        self._clocks: dict[str, Clock] = defaultdict(lambda: defaultdict(int))
        self._pending: dict[str, list[_Copy]] = {OUT: [], BACK: []}
        self._unseen: list[_Copy] = []  # copies whose device memory must not be freed yet
        self._host: dict[int, _Host] = {}

    def compute(self, device: torch.device) -> str:
        self._clocks[self.current][self.current] += 1  # something may have been computed since
        self._look()
        return self.current

    def out(self, device: torch.device) -> str:
        return OUT

    def back(self, device: torch.device) -> str:
        return BACK

    def record(self, stream: str) -> Event:
        self._look()
        return Event(stream, dict(self._clocks[stream]))

    def wait(self, stream: str, event: Event) -> None:
        self._wait(stream, event, "wait")

    def stall(self, stream: str, event: Event) -> None:
        self._wait(stream, event, "stall")

    def _wait(self, stream: str, event: Event, how: str) -> None:
        names = (_kind(stream), _kind(event.stream))
        if self._without in (names, (*names, how)):
            return
        clock = self._clocks[stream]
        for name, number in event.clock.items():
            clock[name] = max(clock[name], number)
        if stream not in (OUT, BACK):
            self._unseen = [c for c in self._unseen if c.owner != stream or not c.is_before(clock)]
            for name in (OUT, BACK):
                self._run(name, clock[name])
        self._look()

    def synchronize(self, event: Event) -> None:
        for name in (OUT, BACK):
            self._run(name, event.clock.get(name, 0))

    def record_stream(self, stream: str, tensor: torch.Tensor) -> None:
        memory = StorageWeakRef(tensor.untyped_storage())
        clock = self._clocks[stream]
        self._unseen = [c for c in self._unseen if c.memory != memory or not c.is_before(clock)]

    def copy(self, stream: str, destination: torch.Tensor, source: torch.Tensor) -> None:
        clock = self._clocks[stream]
        clock[stream] += 1
        device_side, host = (source, destination) if stream == OUT else (destination, source)
        memory = StorageWeakRef(device_side.untyped_storage())
        do = _copying(stream, device_side, host)
        copy = _Copy(stream, clock[stream], defaultdict(int, clock), do, memory, self.current)
        if clock[self.current] != self._clocks[self.current][self.current]:
            self.violations.append(f"a copy {stream} does not wait for compute")
        self._check_host(copy, host.data_ptr())
        if stream == BACK:
            _poison(destination)
        self._pending[stream].append(copy)
        self._unseen.append(copy)
        self._look()

    def pin(self, size: int) -> torch.Tensor | None:
        memory = super().pin(size)
        assert memory is not None
        self._host[memory.data_ptr()] = _Host()
        return memory.fill_(255)  # NaN in every floating type

    def unpin(self, memory: torch.Tensor) -> None:
        used = self._host.pop(memory.data_ptr())
        if any(not copy.done for copy in (used.written, *used.read) if copy is not None):
            self.violations.append("host memory is freed while a copy uses it")

    def stall_s(self) -> float:
        return 0.0

    def headroom(self, device: torch.device) -> float:
        return self.room

    def finish(self) -> None:
        """Does every pending copy."""
        self._look()
        for name in (OUT, BACK):
            self._run(name, self._clocks[name][name])

    def _check_host(self, copy: _Copy, address: int) -> None:
        used = self._host[address]
        if copy.stream == BACK:
            if used.written is None or not used.written.is_before(copy.after):
                self.violations.append("host memory is read before it was written")
            used.read.append(copy)
            return
        for earlier in (used.written, *used.read):
            if earlier is not None and not earlier.is_before(copy.after):
                self.violations.append(f"host memory in use by a copy {earlier.stream} is written")
        used.written, used.read = copy, []

    def _look(self) -> None:
        """Does some copies, and checks for memory that was freed while in use."""
        for copy in self._unseen:
            if copy.memory.expired():
                self.violations.append(f"device memory is freed while a copy {copy.stream} uses it")
        self._unseen = [copy for copy in self._unseen if not copy.memory.expired()]
        for name in (OUT, BACK):
            if self._pending[name] and self._random.random() < self._eagerness:
                self._run(name, self._pending[name][0].number)

    def _run(self, name: str, number: int) -> None:
        """Does a stream's copies up to a number, and those that they wait for."""
        pending = self._pending[name]
        while pending and pending[0].number <= number:
            copy = pending.pop(0)
            for other in (OUT, BACK):
                if other != name:
                    self._run(other, copy.after[other])
            copy.do()
            copy.done = True


def _kind(stream: str) -> str:
    return stream if stream in (OUT, BACK) else COMPUTE


def _copying(stream: str, device_side: torch.Tensor, host: torch.Tensor) -> Callable[[], None]:
    """A function that does a copy. It holds only a weak reference to the device memory."""
    memory = StorageWeakRef(device_side.untyped_storage())
    view = (device_side.storage_offset(), device_side.shape, device_side.stride())
    dtype = device_side.dtype

    def do() -> None:
        storage = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
        if storage is None:  # freed, and possibly reused
            if stream == OUT:
                _poison(host)
            return
        tensor = torch.empty(0, dtype=dtype).set_(storage, *view)  # pyright: ignore
        if stream == OUT:
            host.copy_(tensor)
        else:
            tensor.copy_(host)

    return do


def _poison(tensor: torch.Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0)
