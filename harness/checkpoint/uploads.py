"""Uploads: a store as the place of copies (`checkpoint.remote`).

Rank 0 writes the manifest, which makes the uploaded files a checkpoint, and applies the rules of
retention there.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from operator import or_
from pathlib import Path

from harness import distributed
from harness.checkpoint.copies import Copy
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.remote_store import PARALLEL_FILES, Store, remote_name
from harness.checkpoint.retention import ranked, to_keep
from harness.config.sections import CheckpointConfig
from harness.convert.dropped_saves import Dropped


def _lowest(some: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return more | some


class Uploads:
    """A `copies.Place`."""

    done = "uploaded"
    parallel_files = PARALLEL_FILES

    def __init__(self, store: Store, settings: Callable[[], CheckpointConfig]):
        """`settings`: as they are now; they can change."""
        self._store = store
        self._settings = settings
        self._dropped = Dropped()
        self._read: dict[str, Manifest] = {}

    def share(self, directory: Path, manifest: Manifest) -> list[str]:
        """The files that this rank wrote, where it has them, or that it is the first to have."""
        rank = distributed.global_rank()
        has = [name for name in manifest.files if (directory / name).is_file()]
        share = [name for name in has if manifest.files[name].rank == rank]
        found = distributed.reduce(set(share), or_)
        left = distributed.broadcast(None if found is None else manifest.files.keys() - found) or ()
        first = distributed.all_reduce({name: rank for name in has if name in left}, _lowest)
        return share + [name for name, holder in first.items() if holder == rank]

    def copy_file(self, copy: Copy, file: str, should_stop: Callable[[], bool]) -> None:
        """Uploads it, unless a run that was killed has done so."""
        name = remote_name(copy.directory, copy.manifest)
        if not self._store.has(name, file, copy.manifest.files[file].size):
            self._store.upload(copy.directory / file, name, file, should_stop)

    def complete(self, copy: Copy) -> None:
        """Makes the uploaded files a checkpoint, names the best one, and removes those that no rule
        keeps."""
        if distributed.is_global_leader():
            name = remote_name(copy.directory, copy.manifest)
            self._store.write_manifest(name, copy.manifest)
            found = self._found()
            settings = self._settings()
            good = {path: m for path, m in found.items() if not self._dropped.has(m.saved_at)}
            kept = to_keep(found, settings) | to_keep(good, settings)
            self._keep(found, kept if settings.keep_last else found)
            for name in self._store.unfinished():  # of a run that was killed, or passed over
                self._store.remove(name)

    def forget(self, dropped: Dropped) -> None:
        """Removes the checkpoints that a rollback has dropped, and names the best one of the
        others. Those that are dropped, and what the user had left, do not count any more."""
        self._dropped = dropped
        if distributed.is_global_leader():
            found = self._found()
            is_removed = {path: dropped.removes(m.saved_at, m.pinned) for path, m in found.items()}
            self._keep(found, [path for path in found if not is_removed[path]])

    def close(self) -> None:
        """Nothing is open."""

    def _found(self) -> dict[Path, Manifest]:
        """What the store has, without files and hosts, the newest first."""
        found = self._store.checkpoints(read=self._read)
        self._read = {name: replace(m, files={}, hosts=[]) for name, m in found.items()}
        return {Path(name): manifest for name, manifest in self._read.items()}

    def _keep(self, found: dict[Path, Manifest], kept: Collection[Path]) -> None:
        """Names the best of those that are kept, and removes the others. `found`: the newest
        first."""
        metrics = {p: m.metrics for p, m in found.items() if p in kept and m.finite is not False}
        best = next(iter(ranked(metrics, self._settings())), None)
        self._store.name_best(best.name if best is not None else "")
        for path in found.keys() - kept:
            self._store.remove(path.name)
