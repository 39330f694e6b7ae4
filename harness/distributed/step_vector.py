"""The one small vector that the ranks sum in each step, while the next step runs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from harness.distributed.background import AllReduce


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
        self._sum = AllReduce(Tensor.add_)

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
        self._sum.start(torch.tensor(numbers, dtype=torch.float64))

    def wait(self) -> None:
        """Receives what was contributed at the last exchange, if that has not been received."""
        vector = self._sum.wait()
        if vector is None:
            return
        sums = vector.tolist()
        start = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.receive(sums[start : start + size])
            start += size

    def drain(self) -> None:
        """Exchanges all that there is, and receives it. Blocks."""
        self.exchange()
        self.wait()
