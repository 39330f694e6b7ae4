"""What rollbacks have dropped: checkpoints that no start resumes from, wherever they still are.

A rollback first writes down which saves it drops, then removes them: from the disks, from a store,
from memory. If it is killed in between, or the store is down until the run is killed, the next
start neither takes them nor forgets to remove them.
"""

import json
import logging
import math
from collections.abc import Sequence
from operator import or_
from pathlib import Path
from typing import NamedTuple

from harness import distributed
from harness.checkpoint import retention
from harness.checkpoint.disks import Disks
from harness.checkpoint.manifest import Manifest, read_manifest
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.convert.run_checkpoints import checkpoints_in
from harness.errors import CheckpointError
from harness.files import json_write

log = logging.getLogger(__name__)

FILE = "dropped.json"
"""Next to the checkpoints of a run."""


class Dropped(NamedTuple):
    """The saves of a run after one time, up to another: seconds since 1970, as of `saved_at`."""

    after: float
    until: float

    def has(self, manifest: Manifest) -> bool:
        """Whether it drops a checkpoint. Pinned ones stay."""
        return manifest.pinned is None and self.after < manifest.saved_at <= self.until


def is_dropped(manifest: Manifest, dropped: Sequence[Dropped]) -> bool:
    """Whether one of them drops a checkpoint."""
    return any(each.has(manifest) for each in dropped)


def read_dropped(parent: Path, disks: Disks) -> list[Dropped]:
    """What was written down next to the checkpoints, on any of the disks. Collective. Raises
    CheckpointError on all ranks."""
    known: set[tuple[float, float]] = set()
    with checkpoint_error_on_all_ranks(f"cannot read {parent / FILE}"):
        if disks.is_leader and (parent / FILE).exists():
            try:
                known = {(float(after), float(until)) for after, until in _read(parent)}
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{parent / FILE} is damaged: {error}") from None
    return [Dropped(*each) for each in sorted(distributed.all_reduce(known, or_))]


def drop_after(parent: Path, kept: Manifest, until: float, disks: Disks) -> list[Dropped]:
    """Drops the saves after one, up to a time, and writes that down on each disk. Returns all that
    is dropped, never the one that is `kept`. Collective. Raises CheckpointError on all ranks."""
    dropped = _without(kept, read_dropped(parent, disks))
    return _write([*dropped, Dropped(kept.saved_at, until)], parent, disks)


def keep(kept: Manifest, parent: Path, dropped: Sequence[Dropped], disks: Disks) -> list[Dropped]:
    """Writes down that a save is a checkpoint like others again. Returns what is still dropped.
    Collective. Raises CheckpointError on all ranks."""
    return _write(_without(kept, dropped), parent, disks)


def _without(kept: Manifest, dropped: Sequence[Dropped]) -> list[Dropped]:
    """The same, except for one save."""
    at, found = kept.saved_at, list[Dropped]()
    for each in dropped:
        parts = [each]
        if each.after < at <= each.until:
            parts = [Dropped(each.after, math.nextafter(at, 0)), Dropped(at, each.until)]
        found += [part for part in parts if part.after < part.until]
    return found


def _write(dropped: Sequence[Dropped], parent: Path, disks: Disks) -> list[Dropped]:
    every = sorted(set(dropped))
    with checkpoint_error_on_all_ranks(f"cannot write {parent / FILE}"):
        if disks.is_leader:
            json_write(every, parent / FILE)
    return every


def remove_dropped(parent: Path, dropped: Sequence[Dropped], disks: Disks) -> None:
    """Removes from a directory what is dropped; what cannot be judged stays. Collective. Raises
    CheckpointError on all ranks."""
    with checkpoint_error_on_all_ranks(f"cannot remove what a rollback has dropped in {parent}"):
        for path in checkpoints_in(parent) if dropped and disks.is_leader else ():
            try:
                manifest = read_manifest(path)
            except CheckpointError:
                continue
            if is_dropped(manifest, dropped):
                retention.remove(path)
                log.info("removed %s: a rollback has dropped it", path)


def _read(parent: Path) -> list[list[float]]:
    return json.loads((parent / FILE).read_bytes())
