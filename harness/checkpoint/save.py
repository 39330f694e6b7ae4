"""Saving: one atomic commit across all engines and ranks, or nothing at all.

All files are staged in `step-N.tmp/` and synced; the ranks agree that every write succeeded; rank 0
writes the manifest, renames the directory, and updates `latest`. If each node has its own disk, the
first rank of each does so, and they agree after every operation. Any failure on any rank fails the
save on all ranks, and leaves the older checkpoints unchanged.
"""

import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harness import distributed
from harness.callbacks.moments import Callbacks
from harness.checkpoint.best import link_best
from harness.checkpoint.commit import (
    all_written,
    commit,
    create_staging,
    name_newest,
    write_files,
)
from harness.checkpoint.compatible import engine_manifest
from harness.checkpoint.completeness import common_manifest
from harness.checkpoint.copies import Copies
from harness.checkpoint.disks import Disks, list_saves
from harness.checkpoint.dropped import (
    complete_dropped,
    drop_after,
    newest_save,
    remove_dropped,
)
from harness.checkpoint.files import FileEntry
from harness.checkpoint.manifest import Manifest, digest, step_directory
from harness.checkpoint.memory import Memory
from harness.checkpoint.retention import Removals, prune
from harness.checkpoint.snapshot import Snapshots, bytes_of, storage_sizes
from harness.checkpoint.written import checkpoint_error, checkpoint_error_on_all_ranks
from harness.control.live import LiveConfig
from harness.convert.dropped_saves import Dropped, Span
from harness.data.step_batches import StepBatches
from harness.distributed.rng import rng_state
from harness.engine.engines import Engines
from harness.errors import CheckpointError
from harness.zero.file_trees import FileTrees

log = logging.getLogger(__name__)
log_warning = distributed.global_leader_only(log.warning)

STEP_BACK = 10
"""By how much the thread that writes in the background is nicer than the others (`man 7 sched`)."""


@dataclass(frozen=True)
class SaveResult:
    """The outcome of a save, the same on every rank."""

    path: Path
    error: CheckpointError | None = None
    """Why the save failed; None if there is a checkpoint at `path`."""


@dataclass
class _Pending:
    """A save between its snapshot and its commit."""

    manifest: Manifest
    finite: bool
    """Whether the trained weights that this rank keeps are finite."""
    staged: Path
    target: Path
    writing: Future[dict[str, FileEntry]]


class Saver:
    """Writes checkpoints of the engines and the data position into a directory.

    Every rank calls the same methods at the same steps. With `checkpoint.background` a save copies
    the live tensors and returns; a thread writes the copies, and `poll` commits them at the end of
    a later step. At most one save is in flight. A save that fails has failed on all ranks.
    """

    def __init__(
        self,
        engines: Engines,
        batches: StepBatches,
        live: LiveConfig,
        disks: Disks,
        callbacks: Callbacks,
        copies: Sequence[Copies] = (),
        memory: Memory | None = None,
    ):
        """`disks`: of the run directory. `copies`: of the checkpoints, in other places.
        `memory`: for `save_in_memory`.

        Collective. Raises CheckpointError, on all ranks, if an engine cannot be saved; ConfigError
        if the memory is too small.
        """
        self.directory = live.config.run_dir / "checkpoints"
        self.note = ""
        """Of the checkpoints from now on: `Manifest.note`."""
        self.begins_changed = False
        """Whether the run has resumed with another model, or other data, than was saved."""
        self.begins_in_memory = False
        """Whether the run has resumed from there: its starting point is not on a disk."""
        self.passed_over = Dropped()
        """What was saved before, and does not count any more: no rollback returns to it. That is
        what rollbacks have dropped, and what the run had saved after its starting point, if
        `run.resume` names that."""
        self._left: Span | None = None
        self.disks = disks
        """Of the run directory."""
        self._hosts = distributed.all_gather(socket.gethostname())
        self._engines = engines
        self._batches = batches
        self._live = live
        self._callbacks = callbacks
        self._config_digest = digest(live.config.model_dump_json())
        self._engine_manifests = {name: engine_manifest(engine) for name, engine in engines.items()}
        self._saved_at = newest_save(self.directory, disks)  # the newest there has been
        if memory is not None:
            self._saved_at = max(self._saved_at, newest_save(memory.directory, memory.disks))
        self._pending: _Pending | None = None
        self._all_written = distributed.AsyncAllReduceMax()
        self._snapshots = Snapshots()
        self._thread = ThreadPoolExecutor(1, "save", initializer=distributed.use_device)
        self._background = ThreadPoolExecutor(1, "background-save", initializer=step_back)
        self._reserving: Future[None] | None = None
        self._removals = Removals()
        self._copies = copies
        self._memory = memory
        if memory is not None:
            memory.check_room(sum(bytes_of(engine.collect()) for engine in engines.trained))

    def begin(self, checkpoint: Path | None, is_changed: bool) -> None:
        """Told once from where the run has resumed, if from anywhere, and whether with another
        model, or other data. Collective. Raises CheckpointError on all ranks."""
        memory = self._memory.directory if self._memory is not None else None
        self.begins_changed = is_changed
        self.begins_in_memory = checkpoint is not None and checkpoint.parent == memory
        if checkpoint is not None and self._live.config.run.resume != "latest":
            is_own = checkpoint.parent == self.directory
            after = common_manifest(checkpoint).saved_at if is_own else 0.0
            self._saved_at = distributed.broadcast(self._now())
            self._left = Span(after, self._saved_at)
        self._pass_over(complete_dropped(self.directory, self.disks))

    def _pass_over(self, dropped: Dropped) -> None:
        self.passed_over = dropped | Dropped(left=frozenset({self._left} if self._left else ()))
        for copies in self._copies:
            copies.forget(self.passed_over)

    @property
    def is_writing(self) -> bool:
        """Whether a save is in flight."""
        return self._pending is not None

    def save(self, metrics: dict[str, float], pinned: str | None = None) -> SaveResult | None:
        """Saves this step; no other save may be in flight. Collective.

        `metrics`: the evaluation at this step, for `keep_best`. `pinned`: a name; a pinned
        checkpoint is never pruned. With `checkpoint.background` this returns None once the tensors
        are copied, and `poll` or `wait` return the result later.
        """
        assert self._pending is None
        trees = self._collect()
        target = step_directory(self.directory, self._engines.global_step, pinned)
        staged = target.with_name(f"{target.name}.tmp")
        needed = self.disks.sum(sum(map(bytes_of, trees.values())))
        manifest = self._manifest(metrics, pinned)
        background = self._live.config.checkpoint.background
        try:
            with checkpoint_error_on_all_ranks(f"cannot save {target}"):
                if self.disks.is_leader:
                    self._removals.wait()
                    create_staging(staged, needed)
                finite = all(engine.weights_are_finite() for engine in self._engines.trained)
            if background:
                trees = self._copied(trees, target)
        except CheckpointError as error:
            self._discard(staged)
            return SaveResult(target, error)
        thread = self._background if background else self._thread
        writing = thread.submit(write_files, staged, trees)
        self._pending = _Pending(manifest, finite, staged, target, writing)
        return None if background else self.wait()

    def save_in_memory(self) -> None:
        """Keeps this step in memory; not while the one before is still being copied. Collective."""
        if self._memory is None or self._memory.is_copying:
            return
        trees = self._collect()
        manifest = self._manifest({}, None)
        finite = all(engine.weights_are_finite() for engine in self._engines.trained)
        self._memory.save(manifest, trees, finite)

    def poll(self) -> SaveResult | None:
        """Commits the save in flight if all ranks have written it, and returns the result.

        None if there is none, or it is not written yet. Every rank calls this once per step.
        """
        for copies in self._copies:
            copies.poll()
        if self._memory is not None:
            self._memory.poll()
        if self._reserving is None and self._live.config.checkpoint.background:
            self._reserve()
        if self._pending is None:
            return None
        still_writing = self._all_written.wait()
        if still_writing == [0]:
            return self.wait()
        self._all_written.start([not self._pending.writing.done()])
        return None

    def wait(self) -> SaveResult | None:
        """Waits for the save in flight, and commits it. None if there is none. Collective."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        self._all_written.wait()
        try:
            self._commit(pending)
        except CheckpointError as error:
            return SaveResult(pending.target, error)
        finally:  # uncommitted files must not fill the disk
            self._discard(pending.staged)
        return SaveResult(pending.target)

    def _commit(self, pending: _Pending) -> None:
        """Makes the staged files of all ranks a checkpoint. Raises CheckpointError on all ranks."""
        written = (pending.manifest, pending.target, pending.writing.result, pending.finite)
        manifest = all_written(*written, self.disks)
        commit(manifest, pending.staged, pending.target, self.disks.is_leader)
        log.info("saved %s", pending.target)
        if reason := manifest.fault:
            log_warning("%s: %s: it does not count as a good one", pending.target, reason)
        for copies in self._copies:
            copies.add(pending.target, manifest)
        settings, everywhere, counted = self._live.config.checkpoint, None, None
        if settings.keep_last and (self.disks.count > 1 or self.passed_over):
            saves, everywhere = list_saves(self.directory, self.disks)
            counted = {name for name in everywhere if not self.passed_over.has(saves[name])}
        if self.disks.is_leader and settings.keep_last:
            self._removals.wait()
            needed = set[Path]().union(*(copies.needs for copies in self._copies))
            prune(self.directory, settings, counted, needed, self._removals.add)
        if self.disks.is_leader:
            link_best(self.directory, settings, everywhere)

    def finish_apart(self, exchange: Callable[[str, bool], Sequence[str] | None]) -> None:
        """Commits the save in flight if all ranks have written it, where one of them has failed:
        without a collective.

        `exchange`: what all ranks tell, by rank, to those that read; None if some do not. Raises
        CheckpointError.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        text, writing = "", pending.writing
        if writing.done() and writing.exception() is None:
            entries = {path: asdict(entry) for path, entry in writing.result().items()}
            text = json.dumps([entries, pending.finite])
        told = exchange(text, self.disks.is_leader)
        if told is not None and all(told):
            parts = [json.loads(part) for part in told]
            files = {path: FileEntry(**e) for entries, _ in parts for path, e in entries.items()}
            finite = all(is_finite for _, is_finite in parts)
            manifest = replace(pending.manifest, files=files, finite=finite)
            commit(manifest, pending.staged, pending.target, True, checkpoint_error)
            log.info("saved %s", pending.target)

    def forget_after(self, directory: Path) -> None:
        """Removes the checkpoints that were saved after one of them, unless they are pinned or the
        user had left them, since the run has returned to it; this one is copied where it is not
        yet. Collective. Raises CheckpointError on all ranks."""
        # Up to now: also what is in a memory or a store, and was not seen by this start.
        self._saved_at = distributed.broadcast(self._now())
        kept = common_manifest(directory)
        dropped = drop_after(self.directory, kept, self._saved_at, self._left, self.disks)
        self._pass_over(dropped)
        with checkpoint_error_on_all_ranks(f"cannot return to {directory}"):
            if self.disks.is_leader:
                self._removals.wait()
        remove_dropped(self.directory, dropped, self.disks)
        name_newest(self.directory, dropped, self._live.config.checkpoint, self.disks)
        for copies in self._copies:
            copies.add_existing(directory)  # passed over before, for one that is dropped
        if self._memory is not None:
            self._memory.forget(dropped)

    def finish_copies(self, should_abort: Callable[[], bool]) -> None:
        """Waits for all copies, as `Copies.finish` does. Collective."""
        for copies in self._copies:
            copies.finish(should_abort)

    def close(self) -> None:
        """Ends the threads: abandons a save or a copy in flight, and finishes removals."""
        for copies in self._copies:
            copies.close()
        if self._memory is not None:
            self._memory.close()
        for thread in (self._thread, self._background):
            thread.shutdown(cancel_futures=True)
        self._removals.close()

    def _discard(self, staged: Path) -> None:
        """Removes a staging directory, if it still exists."""
        if self.disks.is_leader:
            shutil.rmtree(staged, ignore_errors=True)

    def _reserve(self) -> None:
        """After the first step, when the optimizers have their state: memory for the copies of a
        save in the background, so that the first one stops training no longer than the others.
        Collective."""
        trees = [engine.collect() for engine in self._engines.trained]
        self._reserving = self._background.submit(self._snapshots.reserve, storage_sizes(trees))

    def _copied(self, trees: FileTrees, target: Path) -> FileTrees:
        with checkpoint_error_on_all_ranks(f"cannot save {target}"):
            try:
                if self._reserving is not None:
                    self._reserving.result()
                return self._snapshots.take(trees)
            except (MemoryError, RuntimeError) as error:  # not enough memory for a copy
                raise CheckpointError(f"{type(error).__name__}: {error}") from None

    def _collect(self) -> FileTrees:
        self._engines.sync_buffers(search=True)
        trees: FileTrees = {
            rank_file(distributed.global_rank()): {
                "rng": rng_state(),
                "engines": self._engines.state_dict(),
                "batches": self._batches.state_dict(),
                "live": self._live.state_dict(),
                "callbacks": self._callbacks.state_dict(),
            }
        }
        for engine in self._engines.trained:  # a teacher is built by the task again
            trees |= engine.collect()
        return trees

    def _now(self) -> float:
        """Later than all saves and rollbacks: a clock may be set back."""
        return max(time.time(), self._saved_at + 1e-3)

    def _manifest(self, metrics: dict[str, float], pinned: str | None) -> Manifest:
        """Without files, the same on every rank. Collective."""
        self._saved_at, metrics = distributed.broadcast((self._now(), metrics))
        return Manifest(
            step=self._engines.global_step,
            world_size=distributed.world_size(),
            engines=self._engine_manifests,
            files={},
            hosts=self._hosts,
            config_digest=self._config_digest,
            metrics=metrics,
            pinned=pinned,
            note=self.note,
            saved_at=self._saved_at,
        )


def step_back() -> None:
    """The calling thread uses this rank's device, and leaves the cores to the others, of all
    processes, where they want them: it then gets a tenth of one.

    Not less, as with 19, a seventieth: where it holds the interpreter's lock, or training hands it
    over, training waits until it has run; and steps beside a save were no faster the less it got,
    only the save took longer (docs/benchmarks.md).
    """
    distributed.use_device()
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(nice + STEP_BACK, 19))


def rank_file(rank: int) -> str:
    """The name of a rank's own file in a checkpoint."""
    return f"rank-{rank:05d}.pt"
