"""Uploads: committed checkpoints copied to a store, behind the training (`checkpoint.remote`).

Each rank uploads the files that it wrote, in threads; when all ranks have done so, rank 0 writes
the manifest, which makes them a checkpoint, and applies the rules of retention there. A store that
is slow or down delays only this: an upload is tried again until it succeeds, and the checkpoint
stays on the disk until then.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from operator import or_
from pathlib import Path

from harness import distributed
from harness.checkpoint.completeness import common_manifest
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.remote_store import PARALLEL_FILES, Stopped, Store, remote_name
from harness.checkpoint.retention import to_keep
from harness.config.sections import CheckpointConfig
from harness.errors import CheckpointError

log = logging.getLogger(__name__)
log_info = distributed.global_leader_only(log.info)
log_warning = distributed.global_leader_only(log.warning)

FIRST_PAUSE_S = 1.0  # between two tries; each is twice the one before
LONGEST_PAUSE_S = 60.0
GIVE_UP_AFTER_S = 60.0  # of failures at the end of a run
SECONDS_BETWEEN_POLLS = 0.05

DONE, BUSY, LOST, GIVEN_UP = range(4)  # of a rank's part; all agree on the largest


@dataclass
class _Upload:
    directory: Path
    manifest: Manifest
    files: tuple[str, ...]
    """Those that this rank uploads."""

    @property
    def name(self) -> str:
        return remote_name(self.directory, self.manifest)

    def stays(self, saved_at: float) -> bool:
        """Whether it outlives a return to the checkpoint of that time."""
        return self.manifest.pinned is not None or self.manifest.saved_at <= saved_at


def _lowest(some: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return more | some


class Uploads:
    """Every rank calls the same methods at the same steps."""

    def __init__(self, store: Store | None, settings: Callable[[], CheckpointConfig]):
        """`store`: None for no uploads. `settings`: as they are now; they can change."""
        self._store = store
        self._settings = settings
        self._queue: list[_Upload] = []
        self._current: _Upload | None = None
        self._working: Future[None] | None = None
        self._finishing = False  # whether the part in work is the manifest
        self._states = distributed.AsyncAllReduceMax()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._closed = threading.Event()
        self._failing_since: float | None = None
        self._told: set[str] = set()
        self._ending_since: float | None = None
        self._left: list[str] = []  # given up
        self._removing: Future[None] | None = None  # what a rollback has dropped

    @property
    def needs(self) -> set[Path]:
        """The checkpoints that must stay on the disk until they are uploaded."""
        uploads = [self._current, *self._queue] if self._current else self._queue
        return {upload.directory for upload in uploads}

    def add(self, directory: Path, manifest: Manifest) -> None:
        """Uploads a checkpoint, of which each rank has the files that it wrote. One that waits is
        passed over for a newer one, unless it is pinned; one in the same directory, which the new
        one has replaced, is dropped, also if some of its files are uploaded. Every rank calls it.
        """
        if self._store is None:
            return
        if (current := self._current) and current.directory == directory and not self._finishing:
            self._drop_current()
        rank = distributed.global_rank()
        files = tuple(name for name, entry in manifest.files.items() if entry.rank == rank)
        self._queue = [u for u in self._queue if u.manifest.pinned and u.directory != directory]
        self._queue.append(_Upload(directory, manifest, files))

    def add_existing(self, directory: Path) -> None:
        """Uploads a checkpoint of an earlier start of the run, if it is not in the store: what is
        there is not copied again. Collective."""
        if self._store is None:
            return
        manifest, rank = common_manifest(directory), distributed.global_rank()
        written = [name for name, entry in manifest.files.items() if entry.rank == rank]
        share = [name for name in written if (directory / name).is_file()]
        found = distributed.reduce(set(share), or_)
        left = distributed.broadcast(None if found is None else manifest.files.keys() - found)
        first = {name: rank for name in left or () if (directory / name).is_file()}
        share += [n for n, r in distributed.all_reduce(first, _lowest).items() if r == rank]
        self._queue.append(_Upload(directory, manifest, tuple(share)))

    def forget_after(self, saved_at: float) -> None:
        """Drops the later checkpoints, unless they are pinned, as the run has returned to the one
        of that time: a resume must not continue from them. Every rank calls it."""
        self._queue = [u for u in self._queue if u.stays(saved_at)]
        if self._current is not None and not self._current.stays(saved_at):
            self._drop_current()
        if self._store is not None and distributed.is_global_leader():
            remove = partial(self._remove_after, self._store, saved_at)
            self._removing = self._thread.submit(self._repeat, remove)

    def poll(self) -> None:
        """Continues. Every rank calls this once per step; it waits for nothing."""
        if self._current is None:
            self._begin_next()
            return
        states = self._states.wait()
        if states == [LOST]:
            log_warning("%s is not uploaded: a rank cannot read its files", self._current.directory)
            self._current = None
        elif states == [GIVEN_UP]:
            self._left, self._current = sorted(path.name for path in self.needs), None
            self._queue.clear()
        elif states == [DONE]:
            self._advance()
        if self._current is not None:
            self._states.start([self._state()])

    def finish(self, should_abort: Callable[[], bool]) -> None:
        """Waits for all uploads. Collective. `should_abort`: called by all ranks alike in between.

        Gives up when the store has failed for a minute; the next start of the run goes on.
        """
        self._ending_since = time.monotonic()
        while self._current is not None or self._queue:
            self.poll()
            if should_abort():
                break
            time.sleep(SECONDS_BETWEEN_POLLS)
        if self._removing is not None:
            wait([self._removing], GIVE_UP_AFTER_S)
        if left := self._left or sorted(path.name for path in self.needs):
            log_warning("not uploaded: %s: the next start uploads the newest", ", ".join(left))

    def close(self) -> None:
        """Ends the threads; an upload in progress is abandoned."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _begin_next(self) -> None:
        if self._queue:
            self._current, self._finishing = self._queue.pop(0), False
            self._working = self._thread.submit(self._upload_files, self._current)
            self._states.start([BUSY])

    def _drop_current(self) -> None:
        """What is uploaded of it remains without a manifest, until `_prune` removes it."""
        self._states.wait()
        self._current = None

    def _advance(self) -> None:
        """All ranks have done their part: the manifest follows, or the upload is complete."""
        assert self._current is not None
        if self._finishing:
            log_info("uploaded %s", self._current.name)
            self._current = None
            return
        self._finishing, self._working = True, None
        if distributed.is_global_leader():
            self._working = self._thread.submit(self._complete, self._current)

    def _state(self) -> int:
        """Of this rank's part."""
        if self._working is None:
            return DONE
        if not self._working.done():
            return GIVEN_UP if self._gives_up() else BUSY
        try:
            self._working.result()
        except OSError as error:  # of the disk: the store's are CheckpointErrors
            log.error("cannot upload: %s", error)
            return LOST
        return DONE

    def _gives_up(self) -> bool:
        if self._ending_since is None or self._failing_since is None:
            return False
        return time.monotonic() - max(self._ending_since, self._failing_since) > GIVE_UP_AFTER_S

    def _upload_files(self, upload: _Upload) -> None:
        with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="upload-file") as pool:
            list(pool.map(partial(self._upload_file, upload), upload.files))

    def _upload_file(self, upload: _Upload, file: str) -> None:
        store, size = self._store, upload.manifest.files[file].size
        assert store is not None

        def copy() -> None:
            if not store.has(upload.name, file, size):  # of a run that was killed
                source = upload.directory / file
                store.upload(source, upload.name, file, self._closed.is_set)

        self._repeat(copy)

    def _complete(self, upload: _Upload) -> None:
        """Makes the uploaded files a checkpoint, and removes those that no rule keeps."""
        store = self._store
        assert store is not None
        self._repeat(partial(store.write_manifest, upload.name, upload.manifest))
        self._repeat(partial(self._prune, store))

    def _remove_after(self, store: Store, saved_at: float) -> None:
        for name, manifest in store.checkpoints().items():
            if manifest.saved_at > saved_at and not manifest.pinned:
                store.remove(name)

    def _prune(self, store: Store) -> None:
        settings = self._settings()
        if settings.keep_last:
            manifests = {Path(name): manifest for name, manifest in store.checkpoints().items()}
            for path in manifests.keys() - to_keep(manifests, settings):
                store.remove(path.name)
        for name in store.unfinished():  # of a run that was killed, or passed over
            store.remove(name)

    def _repeat(self, do: Callable[[], None]) -> None:
        """Does it until the store does not fail. Raises Stopped when these uploads are closed."""
        pause = FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                do()
            except CheckpointError as error:
                self._failing_since = self._failing_since or time.monotonic()
                if (text := str(error)) not in self._told:
                    self._told.add(text)
                    log.warning("%s; trying again; training goes on", text)
            else:
                self._failing_since = None
                return
            self._closed.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise Stopped
