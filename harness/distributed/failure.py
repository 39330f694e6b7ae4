"""How a rank fails or is lost, in words."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import LostRank, first_few


@dataclass(frozen=True)
class Failure:
    """How one rank fails."""

    rank: int
    host: str
    reason: str = ""
    """Empty if it only fails because another one does."""
    step: int | None = None
    phase: str | None = None

    def __str__(self) -> str:
        """`rank 1 on node7 has failed in step 6, phase forward: ValueError: ...`."""
        place = "" if self.step is None else f" in {at(self.step, self.phase)}"
        return f"rank {self.rank} on {self.host} has failed{place}: {self.reason}"


def at(step: int, phase: str | None) -> str:
    """`step 6, phase forward`."""
    return f"step {step}, phase {phase}" if phase else f"step {step}"


def unknown_end(timeout_s: float) -> str:
    """What may have happened to a rank that does not answer."""
    return (
        "its process has ended, its node or the network is down, or it has hung for "
        f"run.timeout_s = {timeout_s:g} s"
    )


def lost_rank(names: Sequence[str], reason: str, what_happened: str) -> LostRank:
    """The error of a rank that has lost the ranks of these names, if they are known."""
    return LostRank(
        f"{socket.gethostname()} has lost {first_few(names) or 'another rank'}: {reason}: "
        f"{what_happened}: see its own output. Start the run again, on these or the remaining "
        "nodes: it resumes from its newest checkpoint"
    )
