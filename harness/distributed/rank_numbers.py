"""A few numbers of each rank, told to rank 0 in a vector of sums."""

from collections.abc import Sequence

from harness.distributed.world import global_rank, world_size

SLOTS = 64
"""Ranks that one vector has room for; with more ranks they take turns."""


class RankNumbers:
    """Numbers of each rank in slots of its own, which are zero on all other ranks.

    The vector does not grow with the world: in a round every rank has its turn, and tells the means
    over the steps since its last one.
    """

    def __init__(self) -> None:
        self._rank, self._world = global_rank(), world_size()
        self._turns = -(-self._world // SLOTS)
        self._turn = 0
        self._totals: list[float] = []
        self._steps = 0  # since this rank's last turn
        self._round: list[Sequence[float]] = []

    def tell(self, numbers: Sequence[float]) -> Sequence[float]:
        """This rank's numbers of a step, equally many on every rank and in every step: what it
        contributes to the sums. Nothing in a world of one."""
        if self._world == 1:
            return ()
        width, before = len(numbers), self._totals
        if self._steps:
            numbers = [total + number for total, number in zip(before, numbers, strict=True)]
        self._steps += 1
        told = [0.0] * (width * min(self._world, SLOTS))
        if self._rank // SLOTS != self._turn:
            self._totals = list(numbers)
            return told
        start = width * (self._rank % SLOTS)
        told[start : start + width] = [number / self._steps for number in numbers]
        self._steps = 0
        return told

    def hear(self, sums: Sequence[float]) -> list[Sequence[float]]:
        """Takes the sums of what the ranks have last told. On rank 0 the numbers by rank, once a
        round has ended; else nothing."""
        turn, self._turn = self._turn, (self._turn + 1) % self._turns
        if self._rank or not sums:
            return []
        width = len(sums) // min(self._world, SLOTS)
        count = min(SLOTS, self._world - turn * SLOTS)
        self._round += [sums[start : start + width] for start in range(0, count * width, width)]
        if self._turn:
            return []
        ended, self._round = self._round, []
        return ended
