"""The link to a run's best checkpoint, by `checkpoint.best_metric`. One rank per disk keeps it."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from harness.checkpoint.retention import manifest_without_files, ranked
from harness.config.sections import CheckpointConfig
from harness.convert.run_checkpoints import BEST, named_in
from harness.errors import CheckpointError
from harness.files import staging_path

log = logging.getLogger(__name__)


def link_best(
    directory: Path, settings: CheckpointConfig, everywhere: Collection[str] | None = None
) -> None:
    """Links the best checkpoint that there is now in `directory` as `best`, or none.

    `everywhere`: with several disks, the names with the same save on all. A failure is logged: the
    run goes on.
    """
    link = directory / BEST
    try:
        metrics = {
            path: _metrics(path)
            for path in sorted(named_in(directory), reverse=True)
            if everywhere is None or path.name in everywhere
        }
        _point(link, next(iter(ranked(metrics, settings)), None))
    except OSError as error:
        log.warning("cannot link the best checkpoint as %s: %s", link, error)


def _point(link: Path, best: Path | None) -> None:
    if best is None:
        link.unlink(missing_ok=True)
        return
    if link.is_symlink() and link.readlink().name == best.name:
        return
    staged = staging_path(link)
    try:
        staged.symlink_to(best.name)
        staged.replace(link)
    finally:
        staged.unlink(missing_ok=True)


def _metrics(path: Path) -> Mapping[str, float]:
    """Of a checkpoint that may be the best; none of others."""
    try:
        manifest = manifest_without_files(path)
    except CheckpointError:
        return {}
    return manifest.metrics if manifest.finite is not False else {}
