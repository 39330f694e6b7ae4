"""How directories come and go, and which checkpoints stay. One rank for each disk calls this."""

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from harness.checkpoint.manifest import LATEST, Manifest, checkpoints_in, read_manifest
from harness.config.sections import CheckpointConfig
from harness.errors import CheckpointError

log = logging.getLogger(__name__)

REPLACED = ".replaced.tmp"
PRUNED = ".pruned.tmp"


def prune(
    directory: Path, settings: CheckpointConfig, everywhere: Collection[str] | None = None
) -> None:
    """Removes the checkpoints that no rule keeps; with `keep_last = 0` none.

    `everywhere`: of several disks, the names that mean the same save on all. The rules choose
    among them, so that all disks keep the same; what else is on this one goes when it is as old.
    Called after a commit only, so that the newest checkpoint is a good one; what `latest` names
    stays in any case. What cannot be removed is logged and left.
    """
    if not settings.keep_last:
        return
    manifests: dict[Path, Manifest] = {}
    for path in checkpoints_in(directory):
        try:
            manifests[path] = read_manifest(path)
        except CheckpointError as error:
            log.warning("kept, although it cannot be read: %s", error)
    common = manifests
    if everywhere is not None:
        common = {path: found for path, found in manifests.items() if path.name in everywhere}
    named = {directory / path.read_text().strip() for path in directory.glob(LATEST)}
    for path in manifests.keys() - kept(common, settings) - kept(manifests, settings) - named:
        try:
            remove(path)
        except OSError as error:
            log.warning("cannot remove %s: %s", path, error)


def kept(manifests: dict[Path, Manifest], settings: CheckpointConfig) -> set[Path]:
    """The checkpoints to keep, of those given, the newest first."""
    keep = set(list(manifests)[: max(1, settings.keep_last)])
    keep |= {path for path, manifest in manifests.items() if manifest.pinned}
    if settings.keep_every:
        keep |= {p for p, manifest in manifests.items() if manifest.step % settings.keep_every == 0}
    sign = 1 if settings.best_mode == "min" else -1
    scores = {
        path: sign * manifest.metrics[settings.best_metric]
        for path, manifest in manifests.items()
        if settings.best_metric in manifest.metrics
    }
    return keep | set(sorted(scores, key=scores.__getitem__)[: settings.keep_best])


def remove(path: Path) -> None:
    """Removes a checkpoint: first its name, so that a half removed one is not a checkpoint."""
    doomed = path.with_name(f"{path.name}{PRUNED}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def put_in_place(staged: Path, target: Path) -> None:
    """Renames a staging directory to `target`. An existing one is put aside until
    `forget_replaced`, or `take_back`, or a crash, which `clean` repairs."""
    if target.exists():  # the same step again
        replaced = _replaced(target)
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    staged.rename(target)


def take_back(staged: Path, target: Path) -> None:
    """Undoes `put_in_place`, however far it came."""
    if not staged.exists():
        target.rename(staged)
    if _replaced(target).exists():
        _replaced(target).rename(target)


def forget_replaced(target: Path) -> None:
    """Removes what `put_in_place` has put aside, if anything."""
    if _replaced(target).exists():
        shutil.rmtree(_replaced(target))


def clean(directory: Path, unfinished: Collection[str] = ()) -> None:
    """Clears away what a killed run left: half-made, half-removed and replaced directories.

    `unfinished`: names that do not mean the same save on all disks. Where one of these has replaced
    another on this disk, that one is restored.
    """
    for replaced in directory.glob(f"step-*{REPLACED}"):
        target = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if target.name in unfinished and target.exists():
            target.rename(target.with_name(f"{target.name}.tmp"))
        if not target.exists():
            replaced.rename(target)
            log.warning("restored %s, which a crash had cut off from its replacement", target)
    for path in directory.glob("step-*.tmp"):
        shutil.rmtree(path)
        log.warning("removed %s, which a crash left unfinished", path)


def _replaced(target: Path) -> Path:
    """Where a directory is put aside while another takes its place."""
    return target.with_name(f"{target.name}{REPLACED}")
