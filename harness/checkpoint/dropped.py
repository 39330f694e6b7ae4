"""Drops what a rollback leaves: no start resumes from it, wherever it still is.

A rollback first writes down which saves it drops, then removes them: from the disks, from a store,
from memory. If it is killed in between, or the store is down until the run is killed, the next
start neither takes them nor forgets to remove them.

Nothing that is written down is ever taken back: what the disks know can be put together, also if
one of them was away meanwhile.
"""

import logging
from contextlib import suppress
from operator import or_
from pathlib import Path

from harness import distributed
from harness.checkpoint import retention
from harness.checkpoint.disks import Disks, list_saves
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.convert.dropped_saves import FILE, Dropped, Kept, Span
from harness.convert.run_checkpoints import checkpoints_in
from harness.errors import CheckpointError
from harness.files import json_write

log = logging.getLogger(__name__)


def read_dropped(parent: Path, disks: Disks) -> Dropped:
    """What was written down next to the checkpoints, on any of the disks. Collective. Raises
    CheckpointError on all ranks."""
    return distributed.all_reduce(_read(parent, disks), or_)


def complete_dropped(parent: Path, disks: Disks, new: Dropped | None = None) -> Dropped:
    """`read_dropped`, and what is `new`, written down on each disk that lacks a part of it.
    Collective. Raises CheckpointError on all ranks."""
    own = _read(parent, disks)
    dropped = distributed.all_reduce(own, or_) | (Dropped() if new is None else new)
    with checkpoint_error_on_all_ranks(f"cannot write {parent / FILE}"):
        if disks.is_leader and own != dropped:
            parent.mkdir(parents=True, exist_ok=True)  # a fresh disk lacks it
            json_write({key: sorted(value) for key, value in vars(dropped).items()}, parent / FILE)
    return dropped


def _read(parent: Path, disks: Disks) -> Dropped:
    """Of this rank's disk, if it leads it. Collective."""
    with checkpoint_error_on_all_ranks(f"cannot read {parent / FILE}"):
        return Dropped.read(parent) if disks.is_leader else Dropped()


def newest_save(parent: Path, disks: Disks) -> float:
    """When the newest checkpoint was saved in a directory, or dropped by a rollback; 0 if there is
    none. Collective. Raises CheckpointError on all ranks."""
    saves, _ = list_saves(parent, disks)
    return max([*saves.values(), read_dropped(parent, disks).until])


def drop_after(
    parent: Path, kept: Manifest, now: float, left: Span | None, disks: Disks
) -> Dropped:
    """Drops the saves after one, up to now, and writes that down on each disk. Returns all that is
    dropped. `left`: what of it the user had left. Collective. Raises CheckpointError on all
    ranks."""
    stays = frozenset({left} if left is not None and left.until > kept.saved_at else ())
    return complete_dropped(parent, disks, Dropped(frozenset({Span(kept.saved_at, now)}), stays))


def keep(kept: Manifest, parent: Path, dropped: Dropped, disks: Disks) -> Dropped:
    """Writes down that a save is one like others again. Returns what is still dropped. Collective.
    Raises CheckpointError on all ranks."""
    again = Kept(kept.saved_at, dropped.until)
    return complete_dropped(parent, disks, Dropped(kept=frozenset({again})))


def remove_dropped(parent: Path, dropped: Dropped, disks: Disks) -> None:
    """Removes from a directory what is dropped; what cannot be judged stays. Collective. Raises
    CheckpointError on all ranks."""
    with checkpoint_error_on_all_ranks(f"cannot remove what a rollback has dropped in {parent}"):
        for path in checkpoints_in(parent) if dropped and disks.is_leader else ():
            try:
                manifest = retention.manifest_without_files(path)
            except CheckpointError:
                continue
            if dropped.removes(manifest.saved_at, manifest.pinned):
                with suppress(FileNotFoundError):  # a thread that copies has just done so
                    retention.remove(path)
                log.info("removed %s: a rollback has dropped it", path)
