"""Whether a checkpoint is complete, on one disk or over several; its files where they are read.

Each node may have a disk of its own, with the files that its ranks wrote. What every rank reads
(below ZeRO 3 the model states, which rank 0 wrote) is sent to the other nodes when a run resumes.
"""

import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from harness import distributed
from harness.checkpoint.disks import find_disks
from harness.checkpoint.files import FileEntry, checkpoint_error_on_all_ranks, verify_file
from harness.checkpoint.manifest import NAME, Manifest, read_manifest
from harness.errors import CheckpointError, missing_files
from harness.files import sync_directory

CHUNK = 64 << 20  # bytes that are sent at once

_OF_A_RANK = re.compile(r"(?:^rank-|zero_pp_rank_)(\d+)(?:_mp_rank_\d+_\w+)?\.pt")


def common_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, also on ranks whose disk does not have it. Collective.

    Raises CheckpointError, on all ranks, if it is damaged, nowhere, or of two saves.
    """
    doing = f"cannot read checkpoint {directory}"
    found: Manifest | None = None
    with distributed.raise_on_all_ranks(doing):
        if (directory / NAME).exists():
            found = read_manifest(directory)
    saves = distributed.all_gather(found and found.saved_at)
    known = [saved for saved in saves if saved is not None]
    with distributed.raise_on_all_ranks(doing):
        if not known:
            raise CheckpointError(f"{directory} is not a checkpoint: there is no {NAME}")
        if len(set(known)) > 1:
            raise CheckpointError(
                f"checkpoint {directory}: not of the same save on all nodes: a kill came between "
                "their commits"
            )
    if None in saves:
        found = distributed.broadcast(found, saves.index(known[0]))
    assert found is not None
    return found


def verified(directory: Path) -> Manifest:
    """Reads all files that a resume needs, on whichever disk, and checks every CRC. Collective.

    The ranks share the work. Of the ranks' own files another number of ranks needs only rank 0's.
    Raises CheckpointError, on all ranks, for what is damaged or nowhere.
    """
    manifest = common_manifest(directory)
    doing = f"cannot read checkpoint {directory}"
    rank, world_size = distributed.global_rank(), distributed.world_size()
    if manifest.world_size == world_size:
        files = manifest.files  # where each node has a disk of its own, it has its ranks' files
        share = [name for name, entry in files.items() if entry.rank == rank]
    else:
        files = {n: e for n, e in manifest.files.items() if "/" in n or e.rank == 0}
        share = list(files)[rank::world_size]
    with distributed.raise_on_all_ranks(doing):
        present = [name for name in share if (directory / name).is_file()]
        for name in present:
            verify_file(directory / name, files[name])
        checked = {name: _identity(directory / name) for name in present}
        disk = _identity(directory) if directory.is_dir() else None
    answers = distributed.all_gather((socket.gethostname(), disk, checked))
    hosts, disks, per_rank = zip(*answers, strict=True)
    found = {name: identity for checked in per_rank for name, identity in checked.items()}
    if len(set(disks)) > 1:
        found |= dict.fromkeys(_copies_verified(directory, files, disks, found))
    with distributed.raise_on_all_ranks(doing):
        if lost := {name: manifest.writer(name) for name in files if name not in found}:
            raise CheckpointError(missing_files(directory, lost, hosts))
    return manifest


def _copies_verified(
    directory: Path,
    files: Mapping[str, FileEntry],
    disks: Sequence[object],
    checked: Mapping[str, object],
) -> set[str]:
    """Verifies the files on the ranks' disks that are not those `checked` already. Collective.

    Returns their names. `disks`: by rank, the same for those that share one."""
    rank = distributed.global_rank()
    with distributed.raise_on_all_ranks(f"cannot read checkpoint {directory}"):
        others = [
            name
            for name in files
            if (directory / name).is_file() and _identity(directory / name) != checked.get(name)
        ]
        mates = [mate for mate, disk in enumerate(disks) if disk == disks[rank]]
        for name in others[mates.index(rank) :: len(mates)]:
            verify_file(directory / name, files[name])
    return set().union(*distributed.all_gather(others))


def files_read_by(rank: int, files: Iterable[str]) -> list[str]:
    """The files that a rank reads when it resumes in the layout of the checkpoint: its own, and
    those of no rank."""
    found = {name: _OF_A_RANK.search(name) for name in files}
    return [name for name, match in found.items() if match is None or int(match[1]) == rank]


def copy_missing_checkpoint(directory: Path, manifest: Manifest, wanted: Iterable[str]) -> None:
    """Copies a verified checkpoint's wanted files, and its manifest, to this rank's disk.

    Collective. Raises CheckpointError, on all ranks, if they cannot be written.
    """
    lacks = not (directory / NAME).exists()
    if any(distributed.all_gather(lacks)):
        disks = find_disks(directory)
        with distributed.raise_on_all_ranks(f"cannot complete {directory}"):
            if lacks and disks.is_leader:
                directory.mkdir(parents=True, exist_ok=True)
                manifest.write(directory)
    copy_missing_files(directory, manifest.files, wanted)


def copy_missing_files(
    directory: Path, files: Mapping[str, FileEntry], wanted: Iterable[str]
) -> None:
    """Copies the wanted ones of the files to this rank's disk: what it lacks is sent by the first
    rank that has it, chunk by chunk. Collective.

    Raises CheckpointError, on all ranks, if that cannot be done, or a copy differs from its file.
    """
    absent = {name for name in wanted if not (directory / name).is_file()}
    shares = distributed.all_gather(absent)
    per_rank = sorted(set().union(*shares))
    if not per_rank:
        return
    disks = find_disks(directory)
    has = distributed.all_gather([(directory / name).is_file() for name in per_rank])
    for number, name in enumerate(per_rank):
        source = [answers[number] for answers in has].index(True)
        lacking = {disks.leaders[rank] for rank, share in enumerate(shares) if name in share}
        _send(directory / name, files[name], source, lacking)


def _send(path: Path, entry: FileEntry, source: int, receivers: set[int]) -> None:
    """Sends a file from rank `source`; each receiver writes it under the same path. Collective."""
    doing = f"cannot fetch {path} from rank {source}"
    receives = distributed.global_rank() in receivers
    staged = path.with_name(f".{path.name}.tmp")
    buffer = torch.empty(min(CHUNK, entry.size), dtype=torch.uint8)
    with ExitStack() as stack:
        with checkpoint_error_on_all_ranks(doing):
            file = None
            if distributed.global_rank() == source:
                file = stack.enter_context(path.open("rb"))
            elif receives:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.callback(staged.unlink, missing_ok=True)
                file = stack.enter_context(staged.open("wb"))
        for start in range(0, entry.size, CHUNK):
            chunk = buffer[: min(CHUNK, entry.size - start)]
            with checkpoint_error_on_all_ranks(doing):
                if file is not None and not receives:
                    file.readinto(chunk.numpy().data)
            dist.broadcast(chunk, src=source, group=distributed.control_group())
            with checkpoint_error_on_all_ranks(doing):
                if file is not None and receives:
                    file.write(chunk.numpy().data)
        with checkpoint_error_on_all_ranks(doing):
            if file is not None and receives:
                file.flush()
                os.fsync(file.fileno())
                verify_file(staged, entry)
                staged.replace(path)
                sync_directory(path.parent)


def _identity(path: Path) -> tuple[int, int]:
    """Equal where two ranks see one file, also over a network: inode, and time of its change."""
    found = path.stat()
    return found.st_ino, found.st_ctime_ns
