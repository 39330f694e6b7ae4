"""Whether a checkpoint is whole, on one disk or over several; and its files where they are read.

Each node may have a disk of its own, with the files that its ranks wrote. What every rank reads
(below ZeRO 3 the model states, which rank 0 wrote) is sent to the other nodes when a run resumes.
"""

import os
import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from harness import distributed
from harness.checkpoint import missing
from harness.checkpoint.disks import find_disks
from harness.checkpoint.durable import FileEntry, sync_directory, told_as, verify_file
from harness.checkpoint.manifest import NAME, Manifest, read_manifest
from harness.errors import CheckpointError

CHUNK = 64 << 20  # bytes that are sent at once

_OF_A_RANK = re.compile(r"(?:^rank-|zero_pp_rank_)(\d+)(?:_mp_rank_\d+_\w+)?\.pt")


def common_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, on ranks whose disk does not have it too. Collective.

    Raises CheckpointError, on all ranks, if it is damaged, nowhere, or of two saves.
    """
    doing = f"cannot read checkpoint {directory}"
    found: Manifest | None = None
    with distributed.in_unison(doing):
        if (directory / NAME).exists():
            found = read_manifest(directory)
    saves = distributed.all_gather(found and found.saved_at)
    known = [saved for saved in saves if saved is not None]
    if not known:
        raise CheckpointError(f"{directory} is no checkpoint: there is no {NAME}")
    if len(set(known)) > 1:
        raise CheckpointError(
            f"checkpoint {directory}: not of one save on all nodes: a kill came between them"
        )
    if None in saves:
        found = distributed.broadcast(found, saves.index(known[0]))
    assert found is not None
    return found


def check(directory: Path, manifest: Manifest) -> None:
    """Reads all files of a checkpoint and checks every CRC, the ranks sharing the work. Collective.

    A file may lie on the disk of any rank. What a rank itself would read is checked as well, where
    it is another copy. Raises CheckpointError, on all ranks, for what is damaged or nowhere.
    """
    doing = f"cannot read checkpoint {directory}"
    rank, world_size = distributed.global_rank(), distributed.world_size()
    share = list(manifest.files)[rank::world_size]
    if manifest.world_size == world_size:  # where each node has its own disk, they are here
        share = [name for name, entry in manifest.files.items() if entry.rank == rank]
    with distributed.in_unison(doing):
        absent = {name for name in share if not (directory / name).is_file()}
        checked = {
            name: _checked(directory / name, manifest.files[name])
            for name in share
            if name not in absent
        }
    shares = distributed.all_gather((checked, absent))
    known = {name: which for each, _ in shares for name, which in each.items()}
    absent = {name for _, each in shares for name in each}
    with distributed.in_unison(doing):
        others = {
            name
            for name in absent | set(read_by(rank, manifest.files))
            if (directory / name).is_file() and _which(directory / name) != known.get(name)
        }
        for name in others:
            _checked(directory / name, manifest.files[name])
    absent -= set().union(*distributed.all_gather(others))
    if absent:
        files = {name: manifest.writer(name) for name in manifest.files if name in absent}
        hosts = distributed.all_gather(socket.gethostname())
        raise CheckpointError(missing.told(directory, files, hosts))


def read_by(rank: int, files: Iterable[str]) -> list[str]:
    """The files that a rank reads when it resumes in the layout of the checkpoint: its own, and
    those that name no rank."""
    found = {name: _OF_A_RANK.search(name) for name in files}
    return [name for name, match in found.items() if match is None or int(match[1]) == rank]


def bring(directory: Path, manifest: Manifest, wanted: Iterable[str]) -> None:
    """Makes a checked checkpoint's wanted files, and its manifest, lie on this rank's disk.
    Collective. Raises CheckpointError, on all ranks, if they cannot be written."""
    with distributed.in_unison(doing := f"cannot complete {directory}"), told_as(doing):
        lacks = not (directory / NAME).exists()
    if any(distributed.all_gather(lacks)):
        disks = find_disks(directory)
        with distributed.in_unison(doing), told_as(doing):
            if lacks and disks.is_leader:
                directory.mkdir(parents=True, exist_ok=True)
                manifest.write(directory)
    fetch(directory, manifest.files, wanted)


def fetch(directory: Path, files: Mapping[str, FileEntry], wanted: Iterable[str]) -> None:
    """Makes the wanted ones of the files lie on this rank's disk: what is not there is sent by the
    first rank that has it, chunk by chunk. Collective.

    Raises CheckpointError, on all ranks, if that cannot be done, or what came is not as it was.
    """
    absent = {name for name in wanted if not (directory / name).is_file()}
    shares = distributed.all_gather(absent)
    everyones = sorted(set().union(*shares))
    if not everyones:
        return
    disks = find_disks(directory)
    has = distributed.all_gather([(directory / name).is_file() for name in everyones])
    for number, name in enumerate(everyones):
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
        with distributed.in_unison(doing), told_as(doing):
            file = None
            if distributed.global_rank() == source:
                file = stack.enter_context(path.open("rb"))
            elif receives:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.callback(staged.unlink, missing_ok=True)
                file = stack.enter_context(staged.open("wb"))
        for start in range(0, entry.size, CHUNK):
            chunk = buffer[: min(CHUNK, entry.size - start)]
            with distributed.in_unison(doing), told_as(doing):
                if file is not None and not receives:
                    file.readinto(chunk.numpy().data)
            dist.broadcast(chunk, src=source, group=distributed.control_group())
            with distributed.in_unison(doing), told_as(doing):
                if file is not None and receives:
                    file.write(chunk.numpy().data)
        with distributed.in_unison(doing), told_as(doing):
            if file is not None and receives:
                file.flush()
                os.fsync(file.fileno())
                verify_file(staged, entry)
                staged.replace(path)
                sync_directory(path.parent)


def _checked(path: Path, entry: FileEntry) -> tuple[int, int]:
    """Which file it is that was checked."""
    verify_file(path, entry)
    return _which(path)


def _which(path: Path) -> tuple[int, int]:
    """The same for two ranks that see one file, also over a network: inode, time of its change."""
    found = path.stat()
    return found.st_ino, found.st_ctime_ns
