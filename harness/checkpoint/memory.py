"""The newest state of a run in host memory: what processes that die leave for the next start.

It is a checkpoint like those on the disk, committed in /dev/shm by the same steps: a manifest with
digests, all ranks or none. Several nodes have each other's copies (`neighbours`). Only the newest
one stays.
"""

import logging
import secrets
import shutil
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path

from harness import distributed, memory_files
from harness.checkpoint.commit import all_written, commit, create_staging, write_files
from harness.checkpoint.copies import Copies, Copy
from harness.checkpoint.disks import Disks, find_disks
from harness.checkpoint.dropped import remove_dropped
from harness.checkpoint.manifest import Manifest, step_directory
from harness.checkpoint.neighbours import Neighbours
from harness.checkpoint.retention import clean, remove
from harness.checkpoint.snapshot import bytes_of
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.config import Config
from harness.convert.dropped_saves import Dropped
from harness.convert.run_checkpoints import checkpoints_in
from harness.errors import CheckpointError, ConfigError
from harness.files import write_atomically
from harness.zero.file_trees import FileTrees

log = logging.getLogger(__name__)
log_warning = distributed.global_leader_only(log.warning)

TOKEN = "control/memory"
"""In the run directory: which memory is of this run, and not of one before it at the same path."""


class Memory:
    """The checkpoints of a run in the memory of its nodes. Every rank calls the same methods at the
    same steps."""

    def __init__(self, root: Path, disks: Disks, token: str):
        """`root`: the same path on every node; `disks`: its memories. `token`: of the run.

        What another run has left there is removed. Collective. Raises HarnessError on all ranks.
        """
        self.directory = root / "checkpoints"
        self.disks = disks
        self._root = root
        self._token = token
        with distributed.raise_on_all_ranks(f"memory in {root}"):
            if disks.is_leader:
                if _read(root / "run") != token:
                    shutil.rmtree(root, ignore_errors=True)
                root.mkdir(mode=0o700, exist_ok=True)
                write_atomically(root / "run", lambda path: path.write_text(token))
                clean(self.directory)
        self._copies = None
        if disks.count > 1:
            self._copies = Copies(_Memories(self.directory, disks))

    def begin(self, run_dir: Path, run_disks: Disks, resumed: Path | None) -> None:
        """Once the run directory exists. `resumed`: the checkpoint that the run starts from; one in
        memory that is not it is removed. Collective. Raises HarnessError on all ranks."""
        with distributed.raise_on_all_ranks(f"run directory {run_dir}"):
            if run_disks.is_leader and _read(run_dir / TOKEN) != self._token:
                write_atomically(run_dir / TOKEN, lambda path: path.write_text(self._token))
            if self.disks.is_leader:
                _keep_only(self.directory, resumed)
        if self._copies is not None and resumed is not None and resumed.parent == self.directory:
            self._copies.add_existing(resumed)

    def check_room(self, own: int) -> None:
        """Raises ConfigError, on all ranks, if the memory of a node does not suffice. Collective.

        `own`: bytes of this rank's state. While a checkpoint is written the one before it stays.
        """
        copied = 2 if self._copies is not None else 1
        needed = 2 * copied * self.disks.sum(own)
        with distributed.raise_on_all_ranks(f"memory in {self._root}"):
            has = sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())
            free = has + shutil.disk_usage(self._root).free
            if needed > free:
                raise ConfigError(
                    f"checkpoint.in_memory_every: it needs {needed / 1e6:,.0f} MB in "
                    f"{memory_files.SHARED} of {socket.gethostname()}, where {free / 1e6:,.0f} MB "
                    "are free: enlarge it (mount -o remount,size=... /dev/shm, docker run "
                    "--shm-size=...), or set checkpoint.in_memory_every = 0"
                )

    @property
    def is_copying(self) -> bool:
        """Whether the newest checkpoint is still being copied to other nodes."""
        return self._copies is not None and bool(self._copies.needs)

    def save(self, manifest: Manifest, trees: FileTrees, finite: bool) -> None:
        """Keeps this step instead of the one before, unless its weights are not finite. Collective.

        `finite`: whether this rank's weights are. A failure is logged: the one before it stays.
        """
        target = step_directory(self.directory, manifest.step)
        staged = target.with_name(f"{target.name}.tmp")
        needed = self.disks.sum(sum(map(bytes_of, trees.values())))
        try:
            with checkpoint_error_on_all_ranks(f"cannot save {target}"):
                if self.disks.is_leader:
                    create_staging(staged, needed)
            manifest = all_written(
                manifest, target, partial(write_files, staged, trees), finite, self.disks
            )
            if manifest.finite is False:
                return
            commit(manifest, staged, target, self.disks.is_leader)
        except CheckpointError as error:
            log_warning("%s; the run continues", error)
            return
        finally:
            if self.disks.is_leader:
                shutil.rmtree(staged, ignore_errors=True)
        if self._copies is not None:
            self._copies.add(target, manifest)
        elif self.disks.is_leader:
            _keep_only(self.directory, target)

    def poll(self) -> None:
        """Continues to copy. Every rank calls this once per step; it waits for nothing."""
        if self._copies is not None:
            self._copies.poll()

    def forget(self, dropped: Dropped) -> None:
        """Removes what a rollback has dropped. Collective. Raises CheckpointError on all ranks."""
        if self._copies is not None:
            self._copies.forget(dropped)
        remove_dropped(self.directory, dropped, self.disks)

    def remove(self) -> None:
        """Frees the memory, at the end of the run. Every rank calls it."""
        self.close()
        if self.disks.is_leader:
            shutil.rmtree(self._root, ignore_errors=True)

    def close(self) -> None:
        """Ends the threads. What is kept stays for the next start."""
        if self._copies is not None:
            self._copies.close()


class _Memories(Neighbours):
    """Once a checkpoint is in two memories, the one before it is not needed."""

    def complete(self, copy: Copy) -> None:
        super().complete(copy)
        if self._disks.is_leader:
            with suppress(OSError):  # the next one removes it
                _keep_only(copy.directory.parent, copy.directory)


def open_memory(config: Config, run_disks: Disks) -> Memory | None:
    """The memory of a run, if `checkpoint.in_memory_every` is set; else what an earlier start has
    left there is freed. Collective. Raises HarnessError on all ranks."""
    if not config.checkpoint.in_memory_every:
        if run_disks.is_leader or distributed.local_rank() == 0:
            memory_files.remove_memory(config.run_dir)
        return None
    with distributed.raise_on_all_ranks("checkpoint.in_memory_every"):
        if not memory_files.SHARED.is_dir():
            raise ConfigError(
                f"checkpoint.in_memory_every: {socket.gethostname()} has no {memory_files.SHARED}"
            )
    root = distributed.broadcast(memory_files.memory_directory(config.run_dir))
    known = [token for token in distributed.all_gather(_read(config.run_dir / TOKEN)) if token]
    token = distributed.broadcast(known[0] if known else secrets.token_hex(8))
    return Memory(root, find_disks(root / "checkpoints"), token)


def _keep_only(directory: Path, kept: Path | None) -> None:
    for path in checkpoints_in(directory):
        if path != kept:
            remove(path)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
