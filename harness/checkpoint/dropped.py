"""What rollbacks have dropped: checkpoints that no start resumes from, wherever they still are.

A rollback first writes down which saves it drops, then removes them: from the disks, from a store,
from memory. If it is killed in between, or the store is down until the run is killed, the next
start neither takes them nor forgets to remove them.

Nothing that is written down is ever taken back: what the disks know can be put together, also if
one of them was away meanwhile.
"""

import json
import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

from harness import distributed
from harness.checkpoint import retention
from harness.checkpoint.disks import Disks, list_saves
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.convert.run_checkpoints import checkpoints_in
from harness.errors import CheckpointError
from harness.files import json_write

log = logging.getLogger(__name__)

FILE = "dropped.json"
"""Next to the checkpoints of a run."""


class Span(NamedTuple):
    """The saves of a run after one time, up to when they were dropped. Times are those of
    `Manifest.saved_at`."""

    after: float
    until: float


class Kept(NamedTuple):
    """A save that is one like others again, whatever was dropped up to a time."""

    saved_at: float
    until: float


@dataclass(frozen=True)
class Dropped:
    """All that the rollbacks of a run have dropped."""

    spans: frozenset[Span] = frozenset()
    left: frozenset[Span] = frozenset()
    """What the user had left before, by `run.resume`: dropped as well, but it stays where it is."""
    kept: frozenset[Kept] = frozenset()

    def __or__(self, other: "Dropped") -> "Dropped":
        return Dropped(self.spans | other.spans, self.left | other.left, self.kept | other.kept)

    def __bool__(self) -> bool:
        return bool(self.spans or self.left)

    @property
    def until(self) -> float:
        """The newest time up to which saves are dropped; 0 if none are."""
        return max((span.until for span in self.spans | self.left), default=0.0)

    def has(self, saved_at: float) -> bool:
        """Whether the save of a time is dropped: "latest" does not mean it, and no rollback returns
        to it."""
        return bool(self._times(self.spans | self.left, saved_at))

    def removes(self, manifest: Manifest) -> bool:
        """Whether a checkpoint is dropped and goes. Pinned ones stay, and what the user had left
        when a rollback dropped it."""
        dropped = self._times(self.spans, manifest.saved_at)
        left = self._times(self.left, manifest.saved_at)
        is_first = bool(dropped) and min(dropped) <= min(left, default=math.inf)
        return manifest.pinned is None and is_first

    def _times(self, spans: Iterable[Span], saved_at: float) -> list[float]:
        """When a save was dropped, since it was last kept: a span is up to then."""
        kept = max((each.until for each in self.kept if each.saved_at == saved_at), default=0.0)
        return [span.until for span in spans if span.after < saved_at <= span.until > kept]


def read_dropped(parent: Path, disks: Disks) -> Dropped:
    """What was written down next to the checkpoints, on any of the disks. Collective. Raises
    CheckpointError on all ranks."""
    return distributed.all_reduce(_read(parent, disks), or_)


def complete_dropped(parent: Path, disks: Disks, new: Dropped = Dropped()) -> Dropped:
    """`read_dropped`, and what is `new`, written down on each disk that lacks a part of it.
    Collective. Raises CheckpointError on all ranks."""
    own = _read(parent, disks)
    dropped = distributed.all_reduce(own, or_) | new
    with checkpoint_error_on_all_ranks(f"cannot write {parent / FILE}"):
        if disks.is_leader and own != dropped:
            parent.mkdir(parents=True, exist_ok=True)  # a fresh disk lacks it
            json_write({key: sorted(value) for key, value in vars(dropped).items()}, parent / FILE)
    return dropped


def _read(parent: Path, disks: Disks) -> Dropped:
    """Of this rank's disk, if it leads it. Collective."""
    with checkpoint_error_on_all_ranks(f"cannot read {parent / FILE}"):
        if not disks.is_leader or not (parent / FILE).exists():
            return Dropped()
        try:
            return _from_json(json.loads((parent / FILE).read_bytes()))
        except (ValueError, TypeError, LookupError) as error:
            raise CheckpointError(
                f"{parent / FILE} is damaged: {error}: remove it, and with run.resume name the "
                "checkpoint to start from, if a rollback was killed"
            ) from None


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
            if dropped.removes(manifest):
                with suppress(FileNotFoundError):  # a thread that copies has just done so
                    retention.remove(path)
                log.info("removed %s: a rollback has dropped it", path)


def _from_json(found: Any) -> Dropped:
    if isinstance(found, list):  # of before there was more than spans
        found = {"spans": found, "left": [], "kept": []}
    spans, left, kept = (
        {(float(one), float(other)) for one, other in found[key]}
        for key in ("spans", "left", "kept")
    )
    return Dropped(
        frozenset(Span(*each) for each in spans),
        frozenset(Span(*each) for each in left),
        frozenset(Kept(*each) for each in kept),
    )
