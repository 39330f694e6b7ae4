"""Whether a checkpoint is complete, on one disk or over several, or cannot be judged.

Each node may have its own disk, with only the files that its ranks wrote.
"""

import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import or_
from pathlib import Path

from harness import distributed
from harness.checkpoint.disks import Disks, list_saves
from harness.checkpoint.files import FileEntry, reading, verify_file
from harness.checkpoint.manifest import Manifest, read_manifest
from harness.checkpoint.retention import remove
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.convert.dropped_saves import Dropped
from harness.convert.run_checkpoints import MANIFEST, identity, no_manifest
from harness.errors import CheckpointError, UnreadableCheckpoint, missing_files
from harness.files import is_present

log = logging.getLogger(__name__)


def common_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, also on ranks whose disk does not have it. Collective.

    Raises CheckpointError, on all ranks, if it is missing, damaged, or not of the same save on all;
    UnreadableCheckpoint if it cannot be judged.
    """
    doing = f"cannot read checkpoint {directory}"
    manifest: Manifest | None = None
    with distributed.raise_on_all_ranks(doing), reading(directory):
        if is_present(directory / MANIFEST):
            manifest = read_manifest(directory)
    saves = distributed.all_reduce({manifest and manifest.saved_at}, or_)
    known = saves - {None}
    with distributed.raise_on_all_ranks(doing):
        if not known:
            raise CheckpointError(no_manifest(directory))
        if len(known) > 1:
            raise CheckpointError(
                f"checkpoint {directory} is not from the same save on all nodes: the run was "
                "killed between their commits"
            )
    source, all_have = distributed.first_rank(manifest is not None)
    if not all_have and source is not None:
        manifest = distributed.broadcast(manifest, source)
    assert manifest is not None
    return manifest


def complete_saves(parent: Path, disks: Disks, dropped: Dropped) -> Iterator[tuple[Path, Manifest]]:
    """The checkpoints all of whose files are on some disk, with finite weights, which no rollback
    has dropped, the newest first; of what the disks hold only the size is looked at. Each step of
    the iteration is collective."""
    saves, _ = list_saves(parent, disks)
    for directory in [parent / name for name in saves]:
        try:
            manifest = common_manifest(directory)
        except CheckpointError:  # told by `choose_checkpoint`
            continue
        is_good = manifest.finite is not False and not dropped.has(manifest.saved_at)
        if _all_present(directory, manifest, disks.is_leader) and is_good:
            yield directory, manifest


def remove_outdated(parent: Path, disks: Disks) -> None:
    """Removes from each disk the saves of which the others together hold a newer one of the same
    name: the node was away when that step was saved again. Collective. Raises CheckpointError on
    all ranks."""
    times, everywhere = list_saves(parent, disks)
    for directory in [parent / name for name in times if name not in everywhere]:
        own: Manifest | None = None
        with suppress(CheckpointError, OSError):  # reported where it is read
            own = read_manifest(directory)
        is_newest = own is not None and own.saved_at == times[directory.name]
        source, all_have = distributed.first_rank(is_newest)
        if source is None or all_have:
            continue
        newest = distributed.broadcast(own, source)
        assert newest is not None
        is_complete = _all_present(directory, newest, disks.is_leader and is_newest)
        with checkpoint_error_on_all_ranks(f"cannot remove {directory}"):
            is_outdated = own is not None and not is_newest and newest.finite is not False
            if is_complete and is_outdated and disks.is_leader:
                remove(directory)
                log.warning("removed %s: other nodes have saved this step again", directory)


def _all_present(directory: Path, manifest: Manifest, looks: bool) -> bool:
    """Whether each file of a checkpoint is, with its size, on a disk of the ranks that look.
    Collective."""
    files = manifest.files.items()
    present = {name for name, entry in files if looks and entry.is_at(directory / name)}
    found = distributed.reduce(present, or_)
    return distributed.broadcast(found == manifest.files.keys())


Verify = Callable[[Path, FileEntry], None]
"""Reads a file and checks its CRCs, as `verify_file`."""


def needed_files(manifest: Manifest) -> tuple[dict[str, FileEntry], list[str]]:
    """The files that a resume needs: with another number of ranks, of the `rank-N.pt` only rank
    0's; and the names of those that this rank verifies."""
    rank, world_size = distributed.global_rank(), distributed.world_size()
    if manifest.world_size == world_size:
        files = manifest.files  # a node with its own disk has its ranks' files
        return files, [name for name, entry in files.items() if entry.rank == rank]
    files = {n: e for n, e in manifest.files.items() if "/" in n or e.rank == 0}
    return files, list(files)[rank::world_size]


def verify_checkpoint(directory: Path, verify: Verify = verify_file) -> Manifest:
    """Reads all files that a resume needs, on any disk, and checks every CRC. Collective.

    The ranks share the work. A damaged file that is whole on another disk is removed: a resume gets
    it from there. Raises CheckpointError, on all ranks, if a file is damaged or missing on all
    disks; UnreadableCheckpoint if a disk does not give one.
    """
    manifest = common_manifest(directory)
    doing = f"cannot read checkpoint {directory}"
    files, share = needed_files(manifest)
    with distributed.raise_on_all_ranks(doing), reading(directory):
        present = {name: files[name] for name in share if is_present(directory / name)}
        damaged = _damaged(directory, present, verify)
        read = {name: identity(directory / name) for name in present}
        disk = identity(directory) if directory.is_dir() else None
    answers = distributed.all_gather((socket.gethostname(), disk, read))
    hosts, disks, per_rank = zip(*answers, strict=True)
    if len(set(disks)) > 1:
        read_by_all = {name: identity for read in per_rank for name, identity in read.items()}
        with distributed.raise_on_all_ranks(doing), reading(directory):
            copies = _own_copies(directory, files, disks, read_by_all)
            present |= copies
            damaged |= _damaged(directory, copies, verify)
    whole = distributed.all_reduce(present.keys() - damaged.keys(), or_)
    with distributed.raise_on_all_ranks(doing):
        if lost := [error for name, error in damaged.items() if name not in whole]:
            raise lost[0]
    with distributed.raise_on_all_ranks(doing):
        if missing := {name: manifest.writer(name) for name in files if name not in whole}:
            raise CheckpointError(missing_files(directory, missing, hosts))
    with checkpoint_error_on_all_ranks(f"cannot remove damaged files of {directory}"):
        for name, error in damaged.items():
            (directory / name).unlink()
            log.warning("%s: removed, since another node has it", error)
    return manifest


def _damaged(
    directory: Path, files: Mapping[str, FileEntry], verify: Verify
) -> dict[str, CheckpointError]:
    """What is wrong with those of the files that are damaged. Raises UnreadableCheckpoint."""
    found: dict[str, CheckpointError] = {}
    for name, entry in files.items():
        try:
            verify(directory / name, entry)
        except UnreadableCheckpoint:
            raise
        except CheckpointError as error:
            found[name] = error
    return found


def _own_copies(
    directory: Path,
    files: Mapping[str, FileEntry],
    disks: Sequence[object],
    read: Mapping[str, object],
) -> dict[str, FileEntry]:
    """This rank's part of the files on its disk that are not those already `read`. `read`:
    `identity` by name. `disks`: by rank, equal where they share one."""
    copies = [
        name
        for name in files
        if is_present(directory / name) and identity(directory / name) != read.get(name)
    ]
    rank = distributed.global_rank()
    sharing = [other for other, disk in enumerate(disks) if disk == disks[rank]]
    return {name: files[name] for name in copies[sharing.index(rank) :: len(sharing)]}
