"""The one small vector that the ranks sum in each step, while the next step runs."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from harness.distributed.world import control_group, world_size


class Part(Protocol):
    """A part of the vector."""

    def contribute(self) -> Sequence[float]:
        """This rank's numbers, equally many on every rank; counts are exact below 2**53."""
        ...

    def receive(self, sums: Sequence[float]) -> None:
        """Takes the sums over all ranks of what was last contributed. Every rank calls it."""
        ...


class StepVector:
    """Sums the numbers of all parts over all ranks, in the background.

    What is contributed at one `exchange` is received at the next, one step later: nothing waits for
    another rank, and everything that is decided by the sums is decided at the same step, on every
    rank and after a resume. Every rank must call each method at the same point.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._sizes: list[int] = []
        self._options = dist.AllreduceOptions()  # of the process group itself: half of the time
        self._options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)
        self._vector = torch.zeros(0, dtype=torch.float64)
        self._work: dist.Work | None = None
        self._own: list[float] | None = None
        """Of a single rank, whose numbers are the sums."""

    def add(self, part: Part) -> None:
        """Adds a part, before the first exchange."""
        self._parts.append(part)

    def exchange(self) -> None:
        """Receives what was contributed at the last exchange, and contributes again."""
        self.wait()
        numbers: list[float] = []
        self._sizes = []
        for part in self._parts:
            own = part.contribute()
            self._sizes.append(len(own))
            numbers += own
        if world_size() == 1:
            self._own = numbers
            return
        self._vector = torch.tensor(numbers, dtype=torch.float64)
        self._work = control_group().allreduce([self._vector], self._options)

    def wait(self) -> None:
        """Receives what was contributed at the last exchange, if that has not been received."""
        if self._own is not None:
            sums, self._own = self._own, None
        elif self._work is not None:
            work, self._work = self._work, None
            work.wait()
            sums = self._vector.tolist()
        else:
            return
        start = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.receive(sums[start : start + size])
            start += size

    def drain(self) -> None:
        """Exchanges all that there is, and receives it. Blocks."""
        self.exchange()
        self.wait()
