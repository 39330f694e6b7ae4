"""A checkpoint's files: staged, written, and committed on all disks or on none."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from operator import or_
from pathlib import Path

from harness import distributed
from harness.checkpoint.best import link_best
from harness.checkpoint.disks import Disks
from harness.checkpoint.files import FileEntry
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.retention import (
    delete_replaced,
    manifest_without_files,
    move_into_place,
    undo_move,
)
from harness.checkpoint.written import checkpoint_error_on_all_ranks, write_file
from harness.config.sections import CheckpointConfig
from harness.convert.dropped_saves import Dropped
from harness.convert.resolve_source import LATEST
from harness.convert.run_checkpoints import checkpoints_in
from harness.errors import CheckpointError
from harness.files import sync_directory, write_atomically
from harness.zero.file_trees import FileTrees


def create_staging(staged: Path, needed: int) -> None:
    """Creates the empty staging directory. Raises OSError, also if fewer than `needed` bytes are
    free."""
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    free = shutil.disk_usage(staged).free
    if needed > free:
        staged.rmdir()
        raise OSError(f"needs {needed / 1e6:,.0f} MB, and only {free / 1e6:,.0f} MB are free")


def write_files(staged: Path, trees: FileTrees) -> dict[str, FileEntry]:
    """Writes and syncs a rank's files below the staging directory. Raises OSError."""
    entries: dict[str, FileEntry] = {}
    for name, tree in trees.items():
        path = staged / name
        path.parent.mkdir(exist_ok=True)
        entries[name] = write_file(tree, path)
        sync_directory(path.parent)
    return entries


def all_written(
    manifest: Manifest,
    target: Path,
    written: Callable[[], dict[str, FileEntry]],
    finite: bool,
    disks: Disks,
) -> Manifest:
    """The manifest of what all ranks have written; on ranks that do not lead a disk without the
    files of others. Collective.

    `written`: writes this rank's files, or waits for them. `finite`: whether the trained weights
    that this rank keeps are. Raises CheckpointError, on all ranks, if one of them cannot write.
    """
    entries: dict[str, FileEntry] = {}
    failures: list[str] = []
    try:
        entries = written()
    except Exception as cause:  # any error: all ranks must learn of it
        failures = [f"rank {distributed.global_rank()}: {type(cause).__name__}: {cause}"]
    failures, finite = distributed.all_reduce(
        (failures, finite), lambda some, more: (some[0] + more[0], some[1] and more[1])
    )
    if failures:
        error = CheckpointError(f"cannot save {target}: " + "; ".join(failures))
        error.on_all_ranks = True
        raise error
    files = distributed.reduce(entries, or_) or entries
    files = distributed.broadcast(files, ranks=disks.all_leaders)
    return replace(manifest, files=files, finite=finite)


def commit(
    manifest: Manifest,
    staged: Path,
    target: Path,
    is_leader: bool,
    agreed: Callable[[str], AbstractContextManager[None]] = checkpoint_error_on_all_ranks,
) -> None:
    """Turns the staging directory into a checkpoint, on all disks or on none; one whose weights
    are finite becomes the latest.

    `is_leader`: whether this rank does it for its disk. `agreed`: the context of each operation;
    by default it is collective, and a CheckpointError of one rank is raised on all. After a kill
    between two disks `retention.clean` restores what the incomplete checkpoint has replaced.
    """
    doing = f"cannot save {target}"
    with agreed(doing):
        if is_leader:
            manifest.write(staged)
            sync_directory(staged)
    try:
        with agreed(doing):
            if is_leader:
                move_into_place(staged, target)
                sync_directory(target.parent)
    except CheckpointError:
        if is_leader:
            with suppress(OSError):  # a broken disk: `clean` does it at the next start
                undo_move(staged, target)
        raise
    with agreed(doing):
        if is_leader:
            if manifest.finite is not False:
                write_latest(target)
            delete_replaced(target)


def write_latest(target: Path) -> None:
    """Writes the checkpoint's name into `latest` next to it."""
    write_atomically(target.with_name(LATEST), lambda path: path.write_text(f"{target.name}\n"))


def name_newest(parent: Path, dropped: Dropped, settings: CheckpointConfig, disks: Disks) -> None:
    """Once rollbacks have dropped checkpoints: on each disk `latest` names one that is there and
    not dropped, and the best one that is there is linked. Collective. Raises CheckpointError on all
    ranks."""
    with checkpoint_error_on_all_ranks(f"cannot name the newest checkpoint in {parent}"):
        if dropped and disks.is_leader:
            good = [path for path in checkpoints_in(parent) if _is_good(path, dropped)]
            if good and _latest(parent) not in good:
                write_latest(good[0])
            link_best(parent, settings)


def _latest(parent: Path) -> Path | None:
    return next((parent / path.read_text().strip() for path in parent.glob(LATEST)), None)


def _is_good(path: Path, dropped: Dropped) -> bool:
    try:
        manifest = manifest_without_files(path)
    except CheckpointError:
        return False
    return manifest.finite is not False and not dropped.has(manifest.saved_at)
