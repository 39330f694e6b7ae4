"""Which ranks share a disk: all of them, or those of a node where each node has its own.

This is probed: one rank creates a file, and every rank checks whether it sees it.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import distributed
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.convert.run_checkpoints import may_hold_manifest, saved_at, steps_in

_Found = tuple[dict[str, tuple[bool, float]], set[str]]


@dataclass(frozen=True)
class Disks:
    """The disks behind a directory that has the same path on every rank."""

    leaders: tuple[int, ...]
    """By rank: the first rank on the same disk. It creates, renames and removes directories for
    the others."""

    @property
    def is_leader(self) -> bool:
        """Whether this rank acts for its disk."""
        return self.leaders[distributed.global_rank()] == distributed.global_rank()

    @property
    def count(self) -> int:
        """Number of disks; 1 if all ranks share one."""
        return len(self.all_leaders)

    @property
    def all_leaders(self) -> tuple[int, ...]:
        """Of all disks; rank 0 is one."""
        return tuple(sorted(set(self.leaders)))

    def sum(self, number: int) -> int:
        """The sum of a number over the ranks on this rank's disk. Collective."""
        own = self.leaders[distributed.global_rank()]
        total = torch.tensor([number])
        ranks = tuple(rank for rank, leader in enumerate(self.leaders) if leader == own)
        distributed.all_reduce_sum(total, ranks)
        return int(total)


def find_disks(directory: Path) -> Disks:
    """The disks at `directory`, or at its nearest parent that exists. Collective.

    One round per disk: the first rank whose disk is still unknown creates a file with a unique
    name, and removes it. Raises HarnessError, on all ranks, if it cannot.
    """
    rank = distributed.global_rank()
    if distributed.world_size() == 1:
        return Disks((0,))
    candidates = [directory, *directory.parents]
    token = distributed.broadcast(uuid.uuid4().hex)
    leaders = [-1] * distributed.world_size()
    while -1 in leaders:
        leader, level = leaders.index(-1), 0
        name = f".{token}-{leader}.probe"
        with distributed.raise_on_all_ranks(f"cannot find out which ranks share {directory}"):
            if rank == leader:
                level = next(n for n, parent in enumerate(candidates) if parent.is_dir())
                (candidates[level] / name).touch(exist_ok=False)
        try:
            probe = candidates[distributed.broadcast(level, leader)] / name
            sees = distributed.all_gather(probe.exists())
        finally:
            if rank == leader:
                (candidates[level] / name).unlink(missing_ok=True)
        leaders = [
            leader if known < 0 and seen else known
            for known, seen in zip(leaders, sees, strict=True)
        ]
    return Disks(tuple(leaders))


def list_saves(directory: Path, disks: Disks) -> tuple[dict[str, float], set[str]]:
    """By the names of all checkpoints in `directory` on any disk, the newest first, those without a
    manifest included: when each was saved; and the names of those that are from the same save on
    every disk. Collective. Raises CheckpointError on all ranks."""
    own: dict[str, tuple[bool, float]] = {}  # with a manifest, when: where one is, it tells
    doing = f"cannot list {directory}"
    with checkpoint_error_on_all_ranks(doing):
        if disks.is_leader:
            own = {p.name: (may_hold_manifest(p), saved_at(p)) for p in steps_in(directory)}
    found = distributed.all_reduce((own, set(own)) if disks.is_leader else None, _both)
    newest, everywhere = found or ({}, set())
    names = sorted(newest, key=lambda name: (newest[name][1], name), reverse=True)
    return {name: newest[name][1] for name in names}, everywhere


def _both(some: _Found | None, more: _Found | None) -> _Found | None:
    """What several disks hold: the newest of each name, and which are the same on all."""
    if some is None or more is None:
        return some or more
    (times, same), (others, too) = some, more
    newest = {n: max(t[n] for t in (times, others) if n in t) for n in times | others}
    return newest, {name for name in same & too if times[name] == others[name]}
