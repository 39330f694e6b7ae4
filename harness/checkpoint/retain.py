"""How directories come and go, and which checkpoints stay. Only rank 0 calls this."""

import logging
import shutil
from pathlib import Path

from harness.checkpoint.manifest import Manifest, checkpoints_in, read_manifest
from harness.errors import CheckpointError
from harness.sections import CheckpointConfig

log = logging.getLogger(__name__)

REPLACED = ".replaced.tmp"
PRUNED = ".pruned.tmp"


def prune(directory: Path, settings: CheckpointConfig) -> None:
    """Removes the checkpoints that no rule keeps; with `keep_last = 0` none.

    Called after a commit only, so that the newest checkpoint is a good one. What cannot be removed
    is told and left.
    """
    if not settings.keep_last:
        return
    manifests: dict[Path, Manifest] = {}
    for path in checkpoints_in(directory):
        try:
            manifests[path] = read_manifest(path)
        except CheckpointError as error:
            log.warning("left alone: %s", error)
    for path in manifests.keys() - kept(manifests, settings):
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
    sign = 1 if settings.best == "lowest" else -1
    scores = {
        path: sign * manifest.metrics[settings.best_metric]
        for path, manifest in manifests.items()
        if settings.best_metric in manifest.metrics
    }
    return keep | set(sorted(scores, key=scores.__getitem__)[: settings.keep_best])


def remove(path: Path) -> None:
    """Removes a checkpoint: first its name, so that a half removed one is none."""
    doomed = path.with_name(f"{path.name}{PRUNED}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def put_in_place(staged: Path, target: Path) -> None:
    """Renames a staging directory to `target`, in place of one that may stand there."""
    if not target.exists():
        staged.rename(target)
        return
    # The same step again. A crash between the renames is mended by `clean`.
    replaced = target.with_name(f"{target.name}{REPLACED}")
    shutil.rmtree(replaced, ignore_errors=True)
    target.rename(replaced)
    staged.rename(target)
    shutil.rmtree(replaced)


def clean(directory: Path) -> None:
    """Clears away what a killed run left: half-made, half-removed and replaced directories."""
    for path in directory.glob(f"step-*{REPLACED}"):
        target = path.with_name(path.name.removesuffix(REPLACED))
        if not target.exists():
            path.rename(target)
            log.warning("restored %s, which a crash had cut off from its replacement", target)
    for path in directory.glob("step-*.tmp"):
        shutil.rmtree(path)
        log.warning("removed %s, which a crash left unfinished", path)
