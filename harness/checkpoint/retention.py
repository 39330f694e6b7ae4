"""Moving and removing directories, and which checkpoints are kept. One rank per disk calls this."""

import logging
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import count, islice
from pathlib import Path

from harness.checkpoint.files import reading
from harness.checkpoint.manifest import Manifest, is_safe, is_unreadable, read_manifest
from harness.config.sections import CheckpointConfig
from harness.convert.resolve_source import LATEST
from harness.convert.run_checkpoints import (
    KEPT,
    MANIFEST,
    checkpoints_in,
    identity,
    may_hold_manifest,
)
from harness.errors import CheckpointError

log = logging.getLogger(__name__)

REPLACED = ".replaced.tmp"
PRUNED = ".pruned.tmp"


class Removals:
    """A thread that deletes the files of checkpoints that have been removed: training does not wait
    until a disk has freed gigabytes."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="remove")
        self._running: list[Future[None]] = []

    def add(self, renamed: Path) -> None:
        """Deletes a directory that is not a checkpoint any more. A failure is logged."""
        self._running.append(self._thread.submit(_delete, renamed))

    def wait(self) -> None:
        """Returns once everything is deleted: its space is free, and its name."""
        while self._running:
            self._running.pop().result()

    def close(self) -> None:
        """Deletes what is left, and ends the thread."""
        self.wait()
        self._thread.shutdown()


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)


def prune(
    directory: Path,
    settings: CheckpointConfig,
    counted: Collection[str] | None = None,
    needed: Collection[Path] = (),
    delete: Callable[[Path], object] = shutil.rmtree,
) -> None:
    """Removes the checkpoints that no rule keeps; with `keep_last = 0` none.

    `counted`: with several disks, the names with the same save on all; without those that no
    rollback returns to. The rules choose among them, so that all disks keep the same ones; others
    on this disk are removed at the same age.
    `needed`: also kept. `delete`: deletes a directory that has been renamed.
    Called only after a commit, so the newest checkpoint is valid. The one that `latest` names is
    always kept, and the newest one that is on two nodes. A failure to remove one is logged.
    """
    if not settings.keep_last:
        return
    manifests: dict[Path, Manifest] = {}
    try:
        for path in checkpoints_in(directory):
            try:
                manifests[path] = manifest_without_files(path)
            except CheckpointError as error:
                log.warning("unreadable checkpoint is not removed: %s", error)
    except OSError as error:
        log.warning("cannot list %s, so nothing is removed: %s", directory, error)
        return
    common = manifests
    if counted is not None:
        common = {path: m for path, m in manifests.items() if path.name in counted}
    keep = {directory / path.read_text().strip() for path in directory.glob(LATEST)} | set(needed)
    for found in (common, manifests):
        keep |= to_keep(found, settings)
        keep |= set(islice((p for p, manifest in found.items() if is_safe(p, manifest)), 1))
    for path in manifests.keys() - keep:
        try:
            remove(path, delete)
        except OSError as error:
            log.warning("cannot remove %s: %s", path, error)


def manifest_without_files(path: Path) -> Manifest:
    """The manifest of a checkpoint, without files and hosts. Raises as `read_manifest`.

    It is read once, since with the files of ten thousand ranks that takes 0.2 s, and at every save
    those of all checkpoints are looked at.
    """
    with reading(path / MANIFEST):
        return _without_files(path, identity(path / MANIFEST))


@lru_cache(4096)
def _without_files(path: Path, _: tuple[int, int]) -> Manifest:
    return replace(read_manifest(path), files={}, hosts=[])


def to_keep(manifests: dict[Path, Manifest], settings: CheckpointConfig) -> set[Path]:
    """The checkpoints to keep. `manifests`: by path, the newest first.

    The newest one, and the newest without a `fault`, are always kept. Those whose weights are not
    finite are neither among the last nor the best: however many follow, they replace none.
    """
    finite = [path for path, manifest in manifests.items() if manifest.finite is not False]
    keep = {*list(manifests)[:1], *finite[: max(1, settings.keep_last)]}
    keep |= set(islice((path for path, manifest in manifests.items() if not manifest.fault), 1))
    keep |= {path for path, manifest in manifests.items() if manifest.pinned}
    if settings.keep_every:
        keep |= {p for p, manifest in manifests.items() if manifest.step % settings.keep_every == 0}
    metrics = {path: manifests[path].metrics for path in finite}
    return keep | set(ranked(metrics, settings)[: settings.keep_best])


def ranked(metrics: Mapping[Path, Mapping[str, float]], settings: CheckpointConfig) -> list[Path]:
    """The checkpoints that have `best_metric`, the best first; of equal ones the first first.
    `metrics`: of those with finite weights, by path, the newest first."""
    sign = 1 if settings.best_mode == "min" else -1
    scores = {p: sign * found.get(settings.best_metric, math.nan) for p, found in metrics.items()}
    return sorted((p for p in scores if math.isfinite(scores[p])), key=scores.__getitem__)


def remove(path: Path, delete: Callable[[Path], object] = shutil.rmtree) -> None:
    """Removes a checkpoint. It is renamed first: a half removed one must not look like one."""
    renamed = path.with_name(f"{path.name}{PRUNED}")
    path.rename(renamed)
    delete(renamed)


def move_into_place(staged: Path, target: Path) -> None:
    """Renames a staging directory to `target`. An existing target is renamed until
    `delete_replaced` or `undo_move`; after a crash `clean` handles it."""
    if target.exists():  # the same step was saved before
        replaced = _replaced(target)
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    staged.rename(target)


def undo_move(staged: Path, target: Path) -> None:
    """Undoes `move_into_place`, also one that failed halfway."""
    if not staged.exists():
        target.rename(staged)
    if _replaced(target).exists():
        _replaced(target).rename(target)


def remove_replaced(target: Path) -> None:
    """Removes the directory that `move_into_place` has replaced, if any, whatever it holds."""
    if _replaced(target).exists():
        remove(_replaced(target))


def delete_replaced(target: Path) -> None:
    """Removes the directory that `move_into_place` has replaced, if any; one that cannot be judged,
    also because it has no manifest, is only renamed."""
    replaced = _replaced(target)
    if not replaced.exists():
        return
    if may_hold_manifest(replaced) and not is_unreadable(replaced):
        remove(replaced)  # half removed it would have no manifest
        return
    kept = target.with_name(f"{target.name}{KEPT}")
    numbers = count(2)
    while kept.exists():
        kept = target.with_name(f"{target.name}.{next(numbers)}{KEPT}")
    replaced.rename(kept)
    log.warning("%s is replaced; the old one is kept as %s", target, kept)


def clean(
    directory: Path, unfinished: Collection[str] = (), unreadable: Collection[str] = ()
) -> None:
    """Removes what a killed run left: half-written, half-removed and replaced directories.

    `unfinished`: names that are not the same save on all disks. If one of them has replaced another
    directory on this disk, that one is restored. `unreadable`: names that cannot be judged on some
    disk; what they have replaced is left as it is.
    """
    left = {_replaced(directory / name) for name in unreadable}
    for replaced in set(directory.glob(f"step-*{REPLACED}")) - left:
        target = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if target.name in unfinished and target.exists():
            target.rename(target.with_name(f"{target.name}.tmp"))
        if target.exists():
            delete_replaced(target)
        else:
            replaced.rename(target)
            log.warning("restored %s: a crash interrupted its replacement", target)
    for path in set(directory.glob("step-*.tmp")) - left:
        shutil.rmtree(path)
        log.warning("removed %s: unfinished, left by a crash", path)


def _replaced(target: Path) -> Path:
    """The path of a replaced directory until it is removed."""
    return target.with_name(f"{target.name}{REPLACED}")
