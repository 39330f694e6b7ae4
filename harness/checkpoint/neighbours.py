"""Another node as the place of copies: its own disk, or its memory.

Each rank sends its files to a rank of another node, into the directory of the same checkpoint
there, by TCP connections of their own. A checkpoint all of whose files are on two nodes is safe:
each node marks it (`manifest.mark_safe`).
"""

import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import or_
from pathlib import Path

import torch

from harness import distributed
from harness.checkpoint.completeness import common_manifest
from harness.checkpoint.copies import Copy
from harness.checkpoint.copy_missing import copy_missing_checkpoint
from harness.checkpoint.disks import Disks
from harness.checkpoint.manifest import SAFE, Manifest, mark_safe, unmark_safe
from harness.checkpoint.transfer import Receiver, send
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.convert.dropped_saves import Dropped
from harness.convert.run_checkpoints import MANIFEST, checkpoints_in
from harness.distributed.network import own_address
from harness.errors import CheckpointError

RACK = "SLURM_TOPOLOGY_ADDR"
"""Where Slurm tells the switches above a node, from the top down, and the node: "s0.s4.node7"."""


class Neighbours:
    """A `copies.Place`."""

    done = "safe on two nodes"
    parallel_files = 1

    def __init__(self, parent: Path, disks: Disks):
        """`parent`: where the checkpoints are, on each node's own of the `disks`, at least two.

        Collective. Raises HarnessError on all ranks.
        """
        self._parent = parent
        self._disks = disks
        self._token = distributed.broadcast(secrets.token_hex(16))
        rack = os.environ.get(RACK, "").rpartition(".")[0]
        with distributed.raise_on_all_ranks("cannot receive copies of checkpoints"):
            self._receiver = Receiver(parent, own_address(), self._token)
        addresses, racks = zip(*distributed.all_gather((self._receiver.address, rack)), strict=True)
        self._to = addresses[neighbours_of(disks.leaders, racks)[distributed.global_rank()]]

    def share(self, directory: Path, manifest: Manifest) -> list[str]:
        """Of the files that no other node has, this rank's part."""
        rank, leaders = distributed.global_rank(), self._disks.leaders
        copy_missing_checkpoint(directory, manifest, ())  # by its manifest a node knows the files
        mates = [other for other, leader in enumerate(leaders) if leader == leaders[rank]]
        counts = zip(manifest.files, _counts(directory, manifest, self._disks), strict=True)
        alone = [name for name, count in counts if count < 2 and (directory / name).is_file()]
        return alone[mates.index(rank) :: len(mates)]

    def copy_file(self, copy: Copy, file: str, should_stop: Callable[[], bool]) -> None:
        """Sends it to the neighbour, unless it has it."""
        send(copy.directory, file, copy.manifest, self._to, self._token, should_stop)

    def complete(self, copy: Copy) -> None:
        """Marks the checkpoint on each disk."""
        if self._disks.is_leader:
            try:
                mark_safe(copy.directory, copy.manifest)
            except OSError as error:
                raise CheckpointError(f"cannot mark {copy.directory} as safe: {error}") from None

    def forget(self, dropped: Dropped) -> None:
        """Nothing: copies are removed with the checkpoint that they are in."""

    def close(self) -> None:
        """Receives no more copies."""
        self._receiver.close()


def neighbours_of(leaders: Sequence[int], racks: Sequence[str]) -> list[int]:
    """By rank: the rank on another disk that gets its files, in another rack if there is one for
    all.

    `leaders`: of `Disks`. `racks`: by rank; empty if unknown. The disks are a ring, sorted by
    rack; each sends to the one as far on as the largest rack is wide. The ranks of a disk are
    divided over those of the next.
    """
    ring = sorted(set(leaders), key=lambda leader: (racks[leader], leader))
    width = max(Counter(racks[leader] for leader in ring).values()) % len(ring)
    mates = {leader: [r for r, own in enumerate(leaders) if own == leader] for leader in ring}
    to: list[int] = []
    for rank, leader in enumerate(leaders):
        others = mates[ring[(ring.index(leader) + (width or 1)) % len(ring)]]
        to.append(others[mates[leader].index(rank) % len(others)])
    return to


def renew_marks(parent: Path, disks: Disks) -> None:
    """Takes the marks from the checkpoints in `parent` that are not on two disks any more, as some
    are lost, or new; of the others, which a kill may have left with a mark on some disks only, each
    disk gets one: all of them keep the same. Collective. Raises CheckpointError on all ranks."""
    marked: list[str] = []
    with checkpoint_error_on_all_ranks(f"cannot list {parent}"):
        if disks.is_leader:
            marked = [p.name for p in checkpoints_in(parent) if (p / SAFE).exists()]
    names = sorted(distributed.all_reduce(set(marked), or_))
    for directory in [parent / name for name in names]:
        manifest: Manifest | None = None
        with suppress(CheckpointError):  # which is reported where it is read
            manifest = common_manifest(directory)
        is_safe = manifest is not None and min(_counts(directory, manifest, disks)) > 1
        with checkpoint_error_on_all_ranks(f"cannot mark {directory}"):
            if not disks.is_leader:
                continue
            if manifest is None or not is_safe:
                unmark_safe(directory)
            elif (directory / MANIFEST).exists():
                mark_safe(directory, manifest)


def _counts(directory: Path, manifest: Manifest, disks: Disks) -> list[int]:
    """On how many disks each file is, with its size. Collective."""
    files = manifest.files.items()
    has = [disks.is_leader and entry.is_at(directory / name) for name, entry in files]
    counts = torch.tensor(has, dtype=torch.int32)
    distributed.all_reduce_sum(counts)
    return counts.tolist()
