"""Copies files of a checkpoint to the nodes that read them.

Each node may have its own disk, with only the files that its ranks wrote. What its ranks read of
the others (below ZeRO 3 the model states, which rank 0 wrote; to reshard, everything) is sent to it
when a run resumes.
"""

import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from harness import distributed
from harness.checkpoint.disks import find_disks
from harness.checkpoint.files import FileEntry, verify_file
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.convert.run_checkpoints import MANIFEST
from harness.distributed.forks import sockets_close_in_forks
from harness.errors import CheckpointError
from harness.files import sync_directory
from harness.zero.rank_files import rank_of_file

CHUNK = 64 << 20  # bytes per broadcast
_RANK_FILE = re.compile(r"rank-(\d+)\.pt")  # as of `save.rank_file`


def files_read_by(rank: int, files: Iterable[str]) -> list[str]:
    """The files that a rank reads when it resumes in the layout of the checkpoint: its own, and
    those that belong to no rank."""
    return [name for name in files if _owner(name) in (None, rank)]


def _owner(name: str) -> int | None:
    """The rank that a file belongs to, harness's own or DeepSpeed's; None if to no rank."""
    match = _RANK_FILE.fullmatch(name)
    return int(match[1]) if match else rank_of_file(name)


def copy_missing_checkpoint(directory: Path, manifest: Manifest, wanted: Iterable[str]) -> None:
    """Copies a verified checkpoint's wanted files, and its manifest, to this rank's disk.

    Collective. Raises CheckpointError, on all ranks, if they cannot be written.
    """
    is_missing = not (directory / MANIFEST).exists()
    if distributed.first_rank(is_missing)[0] is not None:
        disks = find_disks(directory)
        with distributed.raise_on_all_ranks(f"cannot complete {directory}"):
            if is_missing and disks.is_leader:
                directory.mkdir(parents=True, exist_ok=True)
                manifest.write(directory)
    copy_missing_files(directory, manifest.files, wanted)


def copy_missing_files(
    directory: Path, files: Mapping[str, FileEntry], wanted: Iterable[str]
) -> None:
    """Copies the wanted files to this rank's disk: the first rank that has a missing file sends it,
    chunk by chunk. Collective.

    `files`: all files by name. Raises CheckpointError, on all ranks, if a file cannot be read or
    written, or a copy differs from its file.
    """
    absent = {name for name in wanted if not (directory / name).is_file()}
    absent_by_rank = distributed.all_gather(absent)
    missing = sorted(set().union(*absent_by_rank))
    if not missing:
        return
    disks = find_disks(directory)
    receivers = {
        name: {disks.leaders[r] for r, absent in enumerate(absent_by_rank) if name in absent}
        for name in missing
    }
    own = [name for name in missing if distributed.global_rank() in receivers[name]]
    _check_space(directory, sum(files[name].size for name in own))
    present = distributed.all_gather([(directory / name).is_file() for name in missing])
    with sockets_close_in_forks():  # of pairs that are connected first here
        for number, name in enumerate(missing):
            source = [has_file[number] for has_file in present].index(True)
            _send(directory / name, files[name], source, receivers[name])


def _check_space(directory: Path, needed: int) -> None:
    """Raises CheckpointError, on all ranks, if a disk has fewer bytes free. Collective."""
    place = next(path for path in (directory, *directory.parents) if path.is_dir())
    with checkpoint_error_on_all_ranks(f"cannot complete {directory}"):
        free = shutil.disk_usage(place).free
        if needed > free:
            raise CheckpointError(
                f"{socket.gethostname()} lacks files of {needed / 1e6:,.0f} MB that others have, "
                f"and only {free / 1e6:,.0f} MB are free"
            )


def _send(path: Path, entry: FileEntry, source: int, receivers: set[int]) -> None:
    """Sends a file from rank `source`; each receiver writes it under the same path. Collective."""
    doing = f"cannot copy {path} from rank {source}"
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
