"""Saving: one atomic commit across all engines and ranks, or nothing at all.

All files are staged in `step-N.tmp/` and synced; the ranks agree that every write succeeded; rank 0
writes the manifest, renames the directory, and points `latest` at it. Where each node has a disk of
its own, the first rank of each does so, and they agree after every step. Whatever fails, on any
rank, fails the save on all ranks together, and the older checkpoints stay as they are.
"""

import logging
import shutil
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import distributed
from harness.checkpoint.disks import Disks, list_checkpoints
from harness.checkpoint.durable import (
    FileEntry,
    Snapshots,
    as_checkpoint_error,
    bytes_of,
    write_file,
)
from harness.checkpoint.manifest import (
    LATEST,
    EngineManifest,
    Manifest,
    checkpoints_in,
    digest,
    saved_at,
    step_directory,
)
from harness.checkpoint.retention import forget_replaced, prune, put_in_place, take_back
from harness.control.live import Live
from harness.data.loader import Batches
from harness.distributed.rng import rng_state
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.errors import CheckpointError
from harness.files import sync_directory, write_atomically
from harness.zero.layout import PARAMETER_NAMES, Shapes, group_shapes, layout

log = logging.getLogger(__name__)

Jobs = dict[str, Any]
"""What a rank has to write: trees of tensors and plain values, by path below the checkpoint."""

Entries = dict[str, FileEntry]


@dataclass
class _Pending:
    """A save between its snapshot and its commit."""

    manifest: Manifest
    staged: Path
    target: Path
    writing: Future[Entries]


class Saver:
    """Writes checkpoints of the engines and the data position into a directory.

    Every rank calls the same methods at the same steps. With `checkpoint.background` a save copies
    the live tensors and returns; a thread writes the copies, and `poll` commits them at the end of
    a later step. At most one save is in flight.
    """

    def __init__(self, engines: Engines, batches: Batches, live: Live, disks: Disks):
        """`disks`: those behind the run directory.

        Collective. Raises CheckpointError, on all ranks, if an engine cannot be saved.
        """
        self.directory = live.config.run_dir / "checkpoints"
        self._disks = disks
        self._hosts = distributed.all_gather(socket.gethostname())
        self._engines = engines
        self._batches = batches
        self._live = live
        self._config_digest = digest(live.config.model_dump_json())
        self._described = {name: describe(engine) for name, engine in engines.items()}
        self._saved_at = 0.0  # of the newest checkpoint; what counts is what rank 0 knows
        doing = f"cannot look into {self.directory}"
        with distributed.raise_on_all_ranks(doing), as_checkpoint_error(doing):
            if distributed.is_global_leader():
                self._saved_at = max(map(saved_at, checkpoints_in(self.directory)), default=0.0)
        self._pending: _Pending | None = None
        self._all_written = distributed.AsyncAllReduceMax()
        self._snapshots = Snapshots()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")

    @property
    def is_writing(self) -> bool:
        """Whether a save is in flight."""
        return self._pending is not None

    def place(self, pinned: str | None = None) -> Path:
        """Where the checkpoint of this step stands, or the one of that name."""
        return step_directory(self.directory, self._engines.global_step, pinned)

    def save(self, metrics: dict[str, float], pinned: str | None = None) -> None:
        """Saves this step. Raises CheckpointError, on all ranks, if it cannot be done.

        `metrics`: the evaluation at this step, for `keep_best`. `pinned`: a name that keeps the
        checkpoint for good. In the background, what goes wrong later is raised by `poll` or `wait`.
        """
        self.wait()
        jobs = self._collect()
        target = self.place(pinned)
        staged = target.with_name(f"{target.name}.tmp")
        needed = self._disks.sum(sum(map(bytes_of, jobs.values())))
        manifest = distributed.broadcast(self._manifest(metrics, pinned))
        self._saved_at = manifest.saved_at
        background = self._live.config.checkpoint.background
        try:
            with (
                distributed.raise_on_all_ranks(f"cannot save {target}"),
                as_checkpoint_error(f"cannot save {target}"),
            ):
                if self._disks.is_leader:
                    make_room(staged, needed)
            if background:
                jobs = self._copied(jobs, target)
        except CheckpointError:
            self._discard(staged)
            raise
        writing = self._thread.submit(write_files, staged, jobs)
        self._pending = _Pending(manifest, staged, target, writing)
        if not background:
            self.wait()

    def poll(self) -> None:
        """Commits the save in flight if all ranks have written. Call it once a step."""
        if self._pending is None:
            return
        still_writing = self._all_written.harvest()
        if still_writing == [0]:
            self.wait()
        else:
            self._all_written.start([not self._pending.writing.done()])

    def wait(self) -> None:
        """Waits for the save in flight, and commits it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._all_written.harvest()
        entries: Entries = {}
        failure = None
        try:
            entries = pending.writing.result()
        except Exception as error:  # whatever it was, all ranks must hear of it
            failure = f"rank {distributed.global_rank()}: {type(error).__name__}: {error}"
        shares = distributed.all_gather((entries, failure))
        failures = [text for _, text in shares if text]
        try:
            if failures:
                raise CheckpointError(f"cannot save {pending.target}: " + "; ".join(failures))
            files = {path: entry for share, _ in shares for path, entry in share.items()}
            manifest = pending.manifest.model_copy(update={"files": files})
            commit(manifest, pending.staged, pending.target, self._disks.is_leader)
        finally:  # what was not committed must not fill the disk
            self._discard(pending.staged)
        log.info("saved %s", pending.target)
        if self._live.config.checkpoint.keep_last:
            several = self._disks.count > 1
            everywhere = list_checkpoints(self.directory, self._disks)[1] if several else None
            if self._disks.is_leader:
                prune(self.directory, self._live.config.checkpoint, everywhere)

    def close(self) -> None:
        """Ends the thread; a save in flight is given up."""
        self._thread.shutdown(cancel_futures=True)

    def _discard(self, staged: Path) -> None:
        """Removes a staging directory, where it still is one."""
        if self._disks.is_leader:
            shutil.rmtree(staged, ignore_errors=True)

    def _copied(self, jobs: Jobs, target: Path) -> Jobs:
        with (
            distributed.raise_on_all_ranks(f"cannot save {target}"),
            as_checkpoint_error(f"cannot save {target}"),
        ):
            try:
                return self._snapshots.take(jobs)
            except (MemoryError, RuntimeError) as error:  # there is no room for a copy
                raise CheckpointError(f"{type(error).__name__}: {error}") from None

    def _collect(self) -> Jobs:
        jobs: Jobs = {
            rank_file(distributed.global_rank()): {
                "rng": rng_state(),
                "engines": self._engines.state_dict(),
                "batches": self._batches.state_dict(),
                "live": self._live.state_dict(),
            }
        }
        for engine in self._engines.trained:  # a teacher is what the task made it
            jobs |= collect(engine)
        return jobs

    def _manifest(self, metrics: dict[str, float], pinned: str | None) -> Manifest:
        return Manifest(
            step=self._engines.global_step,
            world_size=distributed.world_size(),
            engines=self._described,
            files={},
            hosts=self._hosts,
            config_digest=self._config_digest,
            metrics=metrics,
            pinned=pinned,
            saved_at=max(time.time(), self._saved_at + 1e-3),  # clocks step back
        )


def rank_file(rank: int) -> str:
    """The path of a rank's own file in a checkpoint."""
    return f"rank-{rank:05d}.pt"


def make_room(staged: Path, needed: int) -> None:
    """Makes the empty staging directory. Raises OSError, also if `needed` bytes do not fit."""
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    free = shutil.disk_usage(staged).free
    if needed > free:
        staged.rmdir()
        raise OSError(f"it needs {needed / 1e6:,.0f} MB, and only {free / 1e6:,.0f} MB are free")


def write_files(staged: Path, jobs: Jobs) -> Entries:
    """Writes and syncs a rank's files below the staging directory. Raises OSError."""
    entries: Entries = {}
    for name, tree in jobs.items():
        path = staged / name
        path.parent.mkdir(exist_ok=True)
        entries[name] = write_file(tree, path)
        sync_directory(path.parent)
    return entries


def commit(manifest: Manifest, staged: Path, target: Path, is_leader: bool) -> None:
    """Turns the staging directory into a checkpoint, on all disks or on none. Collective.

    `is_leader`: whether this rank does it for its disk. A kill between two disks leaves something
    that is not whole on all, and what it has replaced comes back (`retain.clean`). Raises
    CheckpointError on all ranks.
    """
    doing = f"cannot save {target}"
    with distributed.raise_on_all_ranks(doing), as_checkpoint_error(doing):
        if is_leader:
            manifest.write(staged)
            sync_directory(staged)
    try:
        with distributed.raise_on_all_ranks(doing), as_checkpoint_error(doing):
            if is_leader:
                put_in_place(staged, target)
                sync_directory(target.parent)
    except CheckpointError:
        if is_leader:
            with suppress(OSError):  # a broken disk: `clean` does it when the run starts again
                take_back(staged, target)
        raise
    with distributed.raise_on_all_ranks(doing), as_checkpoint_error(doing):
        if is_leader:
            point_latest(target)
            forget_replaced(target)


def point_latest(target: Path) -> None:
    """Writes the checkpoint's name into `latest` beside it."""
    write_atomically(target.with_name(LATEST), lambda path: path.write_text(f"{target.name}\n"))


def describe(engine: Engine) -> EngineManifest:
    """What the manifest says of an engine, the same on every rank. Collective.

    Raises CheckpointError, on all ranks, if the engine's layout is not one that can be read.
    """
    trees = collect(engine).values() if engine.role == "train" else []
    found = ""
    with (
        distributed.raise_on_all_ranks(f"engine {engine.name!r}"),
        as_checkpoint_error(f"engine {engine.name!r}"),
    ):
        if trees and distributed.is_global_leader():
            found = layout(trees)
    return EngineManifest(
        zero_stage=engine.zero_stage,
        dtype=str(engine.dtype),
        optimizer=engine.optimizer,
        layout=distributed.broadcast(found),
    )


def collect(engine: Engine) -> Jobs:
    """The trees that DeepSpeed would write for this rank of an engine, without writing them.

    They refer to the live tensors. At ZeRO 0 DeepSpeed would write no names: they are added.
    Collective.
    """
    collector = _Collector()
    kept = engine.ds.checkpoint_engine
    engine.ds.checkpoint_engine = collector
    engine.ds._copy_recovery_script = lambda directory: None  # `zero_to_fp32.py` and the like
    names = {PARAMETER_NAMES: engine.parameter_names}
    try:
        engine.ds.save_checkpoint(".", tag=engine.name, client_state=names, save_latest=False)
    finally:
        engine.ds.checkpoint_engine = kept
    return collector.jobs


def shapes_of(jobs: Jobs) -> list[Shapes]:
    """Rank 0's `zero_layout.group_shapes` of what `collect` gave, on every rank. Collective."""
    models = [tree for tree in jobs.values() if "module" in tree]
    return distributed.broadcast(group_shapes(models[0]) if models else [])


class _Collector:
    """Stands in for DeepSpeed's checkpoint engine: takes the trees, and touches no disk."""

    def __init__(self) -> None:
        self.jobs: Jobs = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.jobs[str(Path(path))] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True
