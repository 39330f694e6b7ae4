"""Which directory `run.resume` means: the path of a checkpoint, of a run, or a step."""

import logging
from pathlib import Path

from harness import distributed
from harness.checkpoint.completeness import common_manifest
from harness.checkpoint.disks import Disks
from harness.checkpoint.dropped import keep
from harness.convert.dropped_saves import Dropped
from harness.convert.resolve_source import LATEST
from harness.convert.run_checkpoints import MANIFEST, checkpoints_in
from harness.errors import CheckpointError
from harness.zero.reader import is_engine

log_info = distributed.global_leader_only(logging.getLogger(__name__).info)


def find_source(wanted: str, parent: Path) -> tuple[Path, bool]:
    """What `run.resume` names, and whether it is a directory of checkpoints, whose newest complete
    one is meant, instead of a checkpoint. Collective.

    `wanted`: a step of this run, whose checkpoints are in `parent`, or a path: of a checkpoint, a
    run directory, its `checkpoints`, or `latest` in it. Nodes with their own disks may lack it.
    Raises CheckpointError, on all ranks, for another path.
    """
    own: tuple[Path, bool] | None = None
    failure = ""
    with distributed.raise_on_all_ranks(f"run.resume = {wanted!r}"):
        try:
            own = locate(wanted, parent)
        except CheckpointError as error:
            failure = str(error)
    first, _ = distributed.first_rank(own is not None)
    with distributed.raise_on_all_ranks(f"run.resume = {wanted!r}"):
        if first is None:
            raise CheckpointError(failure)
    found = distributed.broadcast(own, first or 0)
    assert found is not None
    return found


def keep_requested(wanted: str, parent: Path, dropped: Dropped, disks: Disks) -> Dropped:
    """What is still `dropped` by rollbacks, if `run.resume` may ask for one of these checkpoints:
    that one is kept from now on. Collective. Raises CheckpointError on all ranks."""
    if not dropped or wanted in ("latest", "none"):
        return dropped
    try:
        path, is_parent = find_source(wanted, parent)
        manifest = None if is_parent else common_manifest(path)
    except CheckpointError:  # told where it is resumed from
        return dropped
    if manifest is None or not dropped.has(manifest.saved_at):
        return dropped
    log_info("%s was dropped by a rollback: kept, since run.resume asks for it", path)
    return keep(manifest, parent, dropped, disks)


def locate(wanted: str, parent: Path) -> tuple[Path, bool]:
    """`find_source` on this rank's disk. What is in `parent` is named by that path, however the
    user has named it: others compare."""
    if wanted.isdecimal():
        return _step(int(wanted), parent), False
    path, is_parent = _located(Path(wanted))
    if is_parent:
        return parent if path.resolve() == parent.resolve() else path, True
    found = path.resolve()
    return parent / found.name if found.parent == parent.resolve() else path, False


def _step(step: int, parent: Path) -> Path:
    known: dict[int, Path] = {}
    for path in checkpoints_in(parent):  # the newest first
        known.setdefault(int(path.name.split("-")[1]), path)
    if step not in known:
        steps = ", ".join(map(str, sorted(known))) or "none"
        raise CheckpointError(f"{parent} has no checkpoint of step {step}; its steps: {steps}")
    return known[step]


def _located(path: Path) -> tuple[Path, bool]:
    if path.name == LATEST and path.is_file() and checkpoints_in(path.parent):
        return path.parent, True
    if (path / MANIFEST).exists():
        return path, False
    for parent in (path, path / "checkpoints"):
        if checkpoints_in(parent):
            return parent, True
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if (path.parent / MANIFEST).exists():
        raise CheckpointError(
            f"{path} is a part of a checkpoint: resume from all of it, {path.parent}"
        )
    kind = "a file" if path.is_file() else "no directory of checkpoints of harness"
    if is_engine(path) or (path / LATEST).exists():
        kind = "a checkpoint of plain DeepSpeed"
    raise CheckpointError(
        f"{path} is {kind}: a run resumes from a run directory or one of its checkpoints, and "
        "starts from weights with engines.NAME.init_from"
    )
