"""Which rank the others wait for, step by step: a part of the step's vector.

The ranks take their steps together, so all steps are equally long, and the slow rank shows by what
it does alone: it waits for data, and its forward takes longer (without the time that ZeRO 3 needs
for weights of other ranks). It is told of if in half of the last steps it was the slowest, and
later than the others by a tenth of the step.
"""

import logging
import socket
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness import distributed
from harness.health import phases
from harness.zero.fetches import Fetching

log = logging.getLogger(__name__)

SLOTS = 64
"""Ranks that one vector has room for; with more ranks they take turns."""
WINDOW = 20
"""Rounds that are judged together: in a round every rank has told its times."""
FROM, UNTIL = 10, 5
"""A rank is slow from so many late rounds of a window on, until there are fewer than that."""
SHARE = 0.1
"""Of the time of a step, by which a late rank keeps the others waiting."""


class Times(NamedTuple):
    """Seconds of one rank in a step."""

    data: float
    forward: float
    """The feeder, without waiting for weights of other ranks."""
    step: float
    """All of the step, with waiting for the others."""

    @property
    def own(self) -> float:
        """What others cannot be blamed for."""
        return self.data + self.forward


@dataclass(frozen=True)
class Late:
    """The slowest rank in a round, if the others have waited for it."""

    rank: int
    seconds: float
    """How much later it was than the median of the others."""
    by_data: bool
    """Whether most of that was waiting for data."""


class Pace:
    """The times of all ranks. On rank 0 the metrics `slowest_rank`, `step_time_..._s` and
    `own_time_..._s` (data and forward), a line in the log when a rank begins and ceases to be slow,
    and a note for the status."""

    def __init__(self, note: Callable[[str], None]):
        """`note`: sets what the status says of it, empty if there is nothing. Collective."""
        self._note = note
        self._rank, self._world = distributed.global_rank(), distributed.world_size()
        self._hosts = distributed.gather(socket.gethostname()) or []
        self._turns = -(-self._world // SLOTS)
        self._step = phases.step()  # the last one that was told
        self._told: int | None = None  # the step in flight
        self._steps = 0  # since this rank told its times
        self._totals = _totals()
        self._round: dict[int, Times] = {}
        self._late: deque[Late | None] = deque(maxlen=WINDOW)
        self._slow: int | None = None
        self._metrics: dict[int, dict[str, float]] = {}

    def contribute(self) -> Sequence[float]:
        """Three numbers of each rank whose turn it is, in slots of their own."""
        if self._world == 1:
            return ()
        numbers = [0.0] * (3 * min(self._world, SLOTS))
        step = phases.step()
        self._told = step if step != self._step else None  # not another one, as in an evaluation
        if self._told is None:
            return numbers
        self._step = step
        self._steps += 1
        if self._rank // SLOTS == step % self._turns:
            totals, start = _totals(), 3 * (self._rank % SLOTS)
            numbers[start : start + 3] = [
                (now - before) / self._steps
                for now, before in zip(totals, self._totals, strict=True)
            ]
            self._totals, self._steps = totals, 0
        return numbers

    def receive(self, sums: Sequence[float]) -> None:
        """Takes the times, on rank 0."""
        if self._told is None or self._rank:
            return
        turn = self._told % self._turns
        for rank in range(turn * SLOTS, min((turn + 1) * SLOTS, self._world)):
            start = 3 * (rank % SLOTS)
            self._round[rank] = Times(*sums[start : start + 3])
        if turn == self._turns - 1 and len(self._round) == self._world:
            self._end_round(self._told)

    def of_step(self, step: int) -> dict[str, float]:
        """The metrics of a step, once; none if it has ended no round."""
        for earlier in [known for known in self._metrics if known < step]:
            del self._metrics[earlier]
        return self._metrics.pop(step, {})

    def _end_round(self, step: int) -> None:
        times, self._round = self._round, {}
        steps = [of_rank.step for of_rank in times.values()]
        own = [of_rank.own for of_rank in times.values()]
        self._metrics[step] = {
            "slowest_rank": max(times, key=lambda rank: times[rank].own),
            "step_time_min_s": min(steps),
            "step_time_mean_s": sum(steps) / len(steps),
            "step_time_max_s": max(steps),
            "own_time_min_s": min(own),
            "own_time_mean_s": statistics.fmean(own),
            "own_time_max_s": max(own),
        }
        self._late.append(late_rank(times))
        if self._late[-1] is not None or self._slow is not None:
            self._judge(step)

    def _judge(self, step: int) -> None:
        counts = Counter(late.rank for late in self._late if late is not None)
        rank, count = counts.most_common(1)[0] if counts else (None, 0)
        if self._slow is not None and counts[self._slow] < UNTIL:
            log.info("step %d: %s is no longer slow", step, self._name(self._slow))
            self._slow = None
            self._note("")
        if self._slow is None and rank is not None and count >= FROM:
            self._slow = rank
            late = [late for late in self._late if late is not None and late.rank == rank]
            seconds = statistics.fmean(one.seconds for one in late)
            where = "for its data" if sum(one.by_data for one in late) * 2 > count else "in forward"
            self._note(
                f"{self._name(rank)} is slow: the others wait {seconds:.2g} s a step {where}"
            )
            log.warning(
                "step %d: %s is slow: in %d of the last %d steps the others have waited for it, by "
                "%.2g s, %s",
                *(step, self._name(rank), count, len(self._late), seconds, where),
            )

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def late_rank(times: dict[int, Times]) -> Late | None:
    """The slowest of two or more ranks, if it has kept the others waiting."""
    rank = max(times, key=lambda rank: times[rank].own)
    slowest, others = times[rank], [t for other, t in times.items() if other != rank]
    seconds = slowest.own - statistics.median([other.own for other in others])
    if seconds <= SHARE * sum([of_rank.step for of_rank in times.values()]) / len(times):
        return None
    by_data = slowest.data - statistics.median([other.data for other in others])
    return Late(rank, seconds, by_data > seconds / 2)


def _totals() -> tuple[float, float, float]:
    """As in `Times`, over all steps so far."""
    data, forward = phases.spent("data"), phases.spent("forward")
    step = data + forward + phases.spent("backward") + phases.spent("step")
    return data, forward - Fetching.seconds, step
