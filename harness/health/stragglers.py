"""Which rank the others wait for, step by step.

The ranks take their steps together, so all steps are equally long, and the slow rank shows by what
it does alone: by the times of its phases without waiting for others. It is told of if in half of
the last steps it was the slowest, and later than the others by a tenth of the step.
"""

import logging
import socket
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness import distributed
from harness.health.phases import Phase

log = logging.getLogger(__name__)

WINDOW = 20
"""Rounds that are judged together: in a round every rank has told its times."""
FROM, UNTIL = 10, 5
"""A rank is slow from so many late rounds of a window on, until there are fewer than that."""
SHARE = 0.1
"""Of the time of a step, by which a late rank keeps the others waiting."""
WHERE: dict[Phase, str] = {
    "data": "for its data",
    "forward": "in its forward",
    "backward": "in its backward",
    "step": "in its optimizer",
}


class Times(NamedTuple):
    """Seconds of one rank in a step: in its phases without waiting for the others, and in all."""

    data: float
    forward: float
    backward: float
    optimizer: float
    step: float

    @property
    def own(self) -> float:
        """What others cannot be blamed for."""
        return self.data + self.forward + self.backward + self.optimizer


@dataclass(frozen=True)
class Late:
    """The slowest rank in a round, if the others have waited for it."""

    rank: int
    seconds: float
    """How much later it was than the median of the others."""
    phase: Phase
    """In which most of that came about."""


class Pace:
    """Judges the times of all ranks, on rank 0: a line in the log when a rank begins and ceases to
    be slow, and a note for the status."""

    def __init__(self, note: Callable[[str], None]):
        """`note`: sets what the status says of it, empty if there is nothing. Collective."""
        self._note = note
        self._hosts = distributed.gather(socket.gethostname()) or []
        self._late: deque[Late | None] = deque(maxlen=WINDOW)
        self._slow: int | None = None

    def judge(self, step: int, times: Sequence[Times]) -> None:
        """Takes the times of all ranks in a round that has ended with a step; none if there are
        none."""
        if not times:
            return
        self._late.append(late_rank(times))
        if self._late[-1] is None and self._slow is None:
            return
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
            phase: Phase = statistics.mode(one.phase for one in late)
            where = WHERE[phase]
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


def late_rank(times: Sequence[Times]) -> Late | None:
    """The slowest of two or more ranks, if it has kept the others waiting."""
    own, least = [of_rank.own for of_rank in times], SHARE * times[0].step  # all steps are as long
    if max(own) - min(own) <= least:
        return None
    rank = own.index(max(own))
    others = [of_rank for other, of_rank in enumerate(times) if other != rank]
    seconds = own[rank] - statistics.median([other.own for other in others])
    if seconds <= least:
        return None
    later = [
        own - statistics.median(of_others)
        for own, of_others in zip(times[rank][:4], list(zip(*others, strict=True))[:4], strict=True)
    ]
    return Late(rank, seconds, list(WHERE)[later.index(max(later))])
