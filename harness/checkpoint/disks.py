"""Which ranks write to one disk: all of them, or those of a node, where each has its own.

It is found out: a rank makes a file, and all look whether they see it.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path

from harness import distributed
from harness.checkpoint.files import checkpoint_error_on_all_ranks
from harness.checkpoint.manifest import checkpoints_in, saved_at


@dataclass(frozen=True)
class Disks:
    """The disks behind a directory that has the same path on every rank."""

    leaders: tuple[int, ...]
    """By rank: the first rank that writes to the same disk. It makes, renames and removes
    directories for the others."""

    @property
    def is_leader(self) -> bool:
        """Whether this rank acts for its disk."""
        return self.leaders[distributed.global_rank()] == distributed.global_rank()

    @property
    def count(self) -> int:
        """How many there are; 1 if all ranks share one."""
        return len(set(self.leaders))

    def sum(self, number: int) -> int:
        """The sum of a number over the ranks that write to this rank's disk. Collective."""
        own = self.leaders[distributed.global_rank()]
        shares = zip(distributed.all_gather(number), self.leaders, strict=True)
        return sum(share for share, leader in shares if leader == own)


def find_disks(directory: Path) -> Disks:
    """Who shares a disk at `directory`, or at the nearest one above that is there. Collective.

    As many rounds as there are disks; in each the first rank that sees none of those before makes a
    file of a name that never was, and removes it. Raises HarnessError, on all ranks, if it cannot.
    """
    rank = distributed.global_rank()
    if distributed.world_size() == 1:
        return Disks((0,))
    places = [directory, *directory.parents]
    token = distributed.broadcast(uuid.uuid4().hex)
    leaders = [-1] * distributed.world_size()
    while -1 in leaders:
        leader, level = leaders.index(-1), 0
        name = f".{token}-{leader}.probe"
        with distributed.raise_on_all_ranks(f"cannot find out who shares {directory}"):
            if rank == leader:
                level = next(n for n, place in enumerate(places) if place.is_dir())
                (places[level] / name).touch(exist_ok=False)
        try:
            probe = places[distributed.broadcast(level, leader)] / name
            sees = distributed.all_gather(probe.exists())
        finally:
            if rank == leader:
                (places[level] / name).unlink(missing_ok=True)
        leaders = [leader if was < 0 and s else was for was, s in zip(leaders, sees, strict=True)]
    return Disks(tuple(leaders))


def list_checkpoints(directory: Path, disks: Disks) -> tuple[list[str], set[str]]:
    """The names of all checkpoints in `directory` on any disk, the newest first; and of those that
    are on every disk, of one and the same save. Collective. Raises CheckpointError on all ranks."""
    here: dict[str, float] = {}
    doing = f"cannot list {directory}"
    with checkpoint_error_on_all_ranks(doing):
        if disks.is_leader:
            here = {path.name: saved_at(path) for path in checkpoints_in(directory)}
    shares = distributed.all_gather(here)
    per_rank = [shares[leader] for leader in sorted(set(disks.leaders))]
    last: dict[str, float] = {}
    for share in per_rank:
        last |= {name: max(at, last.get(name, at)) for name, at in share.items()}
    names = sorted(last, key=lambda name: (last[name], name), reverse=True)
    return names, {name for name in names if len({s.get(name) for s in per_rank}) == 1}
