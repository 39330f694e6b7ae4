"""The link to a run's best checkpoint, by `checkpoint.best_metric`. One rank per disk keeps it."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from harness.checkpoint.manifest import read_manifest
from harness.checkpoint.retention import ranked
from harness.config.sections import CheckpointConfig
from harness.convert.run_checkpoints import BEST, named_in
from harness.errors import CheckpointError
from harness.files import staging_path

log = logging.getLogger(__name__)


class BestLink:
    """`checkpoints/best`. Each manifest is read once."""

    def __init__(self, directory: Path):
        self._link = directory / BEST
        self._metrics: dict[Path, Mapping[str, float]] = {}

    def update(
        self,
        settings: CheckpointConfig,
        saved: Path | None = None,
        everywhere: Collection[str] | None = None,
    ) -> None:
        """Links the best checkpoint that there is now, or none. `saved`: the one that is new.
        `everywhere`: as in `retention.prune`. A failure is logged: the run goes on."""
        try:
            paths = sorted(named_in(self._link.parent), reverse=True)
            self._metrics = {
                path: self._metrics[path]
                if path in self._metrics and path != saved
                else _metrics(path)
                for path in paths
                if everywhere is None or path.name in everywhere
            }
            best = next(iter(ranked(self._metrics, settings)), None)
            self._point_to(best)
        except OSError as error:
            log.warning("cannot link the best checkpoint as %s: %s", self._link, error)

    def _point_to(self, best: Path | None) -> None:
        if best is None:
            self._link.unlink(missing_ok=True)
            return
        if self._link.is_symlink() and self._link.readlink().name == best.name:
            return
        staged = staging_path(self._link)
        try:
            staged.symlink_to(best.name)
            staged.replace(self._link)
        finally:
            staged.unlink(missing_ok=True)


def _metrics(path: Path) -> Mapping[str, float]:
    """Of a checkpoint that may be the best; none of others."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return {}
    return manifest.metrics if manifest.finite is not False else {}
