"""Copies: committed checkpoints in another place as well, behind the training.

Each rank copies the files that it wrote, in threads; when all ranks have done so, the place makes
them a checkpoint. A place that is slow or down delays only this: a file is tried again until it
succeeds, and the checkpoint stays on the disk until then.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from harness import distributed
from harness.checkpoint.completeness import common_manifest
from harness.checkpoint.files import Stopped
from harness.checkpoint.manifest import Manifest
from harness.convert.dropped_saves import Dropped
from harness.errors import CheckpointError

log = logging.getLogger(__name__)
log_info = distributed.global_leader_only(log.info)
log_warning = distributed.global_leader_only(log.warning)

FIRST_PAUSE_S = 1.0  # between two tries; each is twice the one before
LONGEST_PAUSE_S = 60.0
GIVE_UP_AFTER_S = 60.0  # of failures at the end of a run
WORD_AFTER_S = 60.0  # that the end of a run waits for this rank; then each time after twice as long
SECONDS_BETWEEN_POLLS = 0.05

DONE, BUSY, LOST, GIVEN_UP = range(4)  # of a rank's part; all agree on the largest


@dataclass
class Copy:
    """A checkpoint that is to be copied."""

    directory: Path
    manifest: Manifest
    files: Sequence[str]
    """Those that this rank copies."""
    is_dropped: threading.Event = field(default_factory=threading.Event)


class Place(Protocol):
    """Where checkpoints are copied to. Its methods are called in threads of each rank, unless they
    are collective; a CheckpointError of one means: try again."""

    done: str
    """What a checkpoint is that has been copied: "uploaded"."""
    parallel_files: int
    """How many files of a rank are copied at a time."""

    def share(self, directory: Path, manifest: Manifest) -> Sequence[str]:
        """The files that this rank copies of a checkpoint that may be there in part, of an earlier
        start or before a rollback. Collective."""
        ...

    def copy_file(self, copy: Copy, file: str, should_stop: Callable[[], bool]) -> None:
        """Copies a file, unless it is there. Raises OSError if it cannot be read; Stopped."""
        ...

    def complete(self, copy: Copy) -> None:
        """Makes the files a checkpoint there, once all ranks have copied theirs."""
        ...

    def forget(self, dropped: Dropped) -> None:
        """Removes the checkpoints there that a rollback has dropped, and names the best one of the
        others, where one is named."""
        ...

    def close(self) -> None:
        """Ends the connections to it."""
        ...


class Copies:
    """The copies of a run's checkpoints in one place. Every rank calls the same methods at the same
    steps."""

    def __init__(self, place: Place):
        self._place = place
        self._queue: list[Copy] = []
        self._current: Copy | None = None
        self._working: Future[None] | None = None
        self._finishing = False  # whether all files are copied
        self._states = distributed.AsyncAllReduceMax()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._closed = threading.Event()
        self._failing_since: float | None = None
        self._told: set[str] = set()
        self._ending_since: float | None = None
        self._left: list[str] = []  # given up
        self._removing: Future[None] | None = None  # what a rollback has dropped

    @property
    def needs(self) -> set[Path]:
        """The checkpoints that must stay on the disk until they are copied."""
        return {copy.directory for copy in self._copies}

    @property
    def _copies(self) -> list[Copy]:
        """The current one, and those that wait."""
        return [self._current, *self._queue] if self._current else self._queue

    def add(self, directory: Path, manifest: Manifest) -> None:
        """Copies a checkpoint, of which each rank has the files that it wrote. One that waits is
        passed over for a newer one, unless it is pinned; one in the same directory, which the new
        one has replaced, is dropped, also if some of its files are copied. Every rank calls it.
        """
        if (current := self._current) and current.directory == directory and not self._finishing:
            self._drop_current()
        rank = distributed.global_rank()
        files = [name for name, entry in manifest.files.items() if entry.rank == rank]
        self._queue = [c for c in self._queue if c.manifest.pinned and c.directory != directory]
        self._queue.append(Copy(directory, manifest, files))

    def add_existing(self, directory: Path) -> None:
        """Copies a checkpoint that was not saved just now: of an earlier start of the run, or one
        that a rollback returns to. What is there is not copied again, and nothing is queued twice.
        Collective."""
        manifest = common_manifest(directory)
        if (directory, manifest.saved_at) not in {
            (copy.directory, copy.manifest.saved_at) for copy in self._copies
        }:
            self._queue.append(Copy(directory, manifest, self._place.share(directory, manifest)))

    def forget(self, dropped: Dropped) -> None:
        """Drops what a rollback has dropped, of this start of the run or an earlier one: a resume
        must not continue from it. Every rank calls it."""

        def is_dropped(copy: Copy) -> bool:
            return dropped.removes(copy.manifest.saved_at, copy.manifest.pinned)

        self._queue = [copy for copy in self._queue if not is_dropped(copy)]
        if self._current is not None and is_dropped(self._current):
            self._drop_current()
        if dropped:
            remove = partial(self._place.forget, dropped)
            self._removing = self._thread.submit(self._repeat, remove)

    def poll(self) -> None:
        """Continues. Every rank calls this once per step; it waits for nothing."""
        if self._current is None:
            self._begin_next()
            return
        states = self._states.wait()
        if states == [LOST]:
            what = self._current.directory
            log_warning("%s is not %s: a rank cannot read its files", what, self._place.done)
            self._current = None
        elif states == [GIVEN_UP]:
            self._left, self._current = sorted(path.name for path in self.needs), None
            self._queue.clear()
        elif states == [DONE]:
            self._advance()
        if self._current is not None:
            self._states.start([self._state()])

    def finish(self, should_abort: Callable[[], bool]) -> None:
        """Waits for all copies, and for what is to be removed. Collective. `should_abort`: called
        by all ranks alike in between.

        Gives up when the place has failed for a minute; the next start of the run goes on.
        """
        self._ending_since = time.monotonic()
        word_after = WORD_AFTER_S
        while self.needs or self._is_removing():
            self.poll()
            if should_abort():
                break
            waited = time.monotonic() - self._ending_since
            if waited > word_after and self._current is not None and self._state() == BUSY:
                word_after = 2 * waited
                log.warning(
                    "the end of the run has waited for %.0f s, as this rank's part of %s is not %s "
                    "yet: a signal, or the command quit, ends that",
                    *(waited, self._current.directory.name, self._place.done),
                )
            time.sleep(SECONDS_BETWEEN_POLLS)
        if left := self._left or sorted(path.name for path in self.needs):
            text = "not %s: %s: the next start goes on with the newest"
            log_warning(text, self._place.done, ", ".join(left))

    def _is_removing(self) -> bool:
        """Whether a rank still removes what is dropped, and has not failed for too long. Collective
        if anything is dropped."""
        if self._removing is None:
            return False
        is_busy = not self._removing.done() and not self._gives_up()
        return distributed.all_reduce_max([is_busy]) == [1]

    def close(self) -> None:
        """Ends the threads; a copy in progress is abandoned."""
        self._closed.set()
        self._place.close()
        self._thread.shutdown(cancel_futures=True)

    def _begin_next(self) -> None:
        if self._queue:
            self._current, self._finishing = self._queue.pop(0), False
            self._working = self._thread.submit(self._copy_files, self._current)
            self._states.start([BUSY])

    def _drop_current(self) -> None:
        """What is copied of it remains until its place removes it."""
        assert self._current is not None
        self._states.wait()
        self._current.is_dropped.set()
        self._current = None

    def _advance(self) -> None:
        """All ranks have done their part: the place completes it, or has done so."""
        assert self._current is not None
        if self._finishing:
            log_info("%s is %s", self._current.directory, self._place.done)
            self._current = None
            return
        self._finishing = True
        complete = partial(self._place.complete, self._current)
        self._working = self._thread.submit(self._repeat, complete, self._current)

    def _state(self) -> int:
        """Of this rank's part."""
        assert self._working is not None
        if not self._working.done():
            return GIVEN_UP if self._gives_up() else BUSY
        try:
            self._working.result()
        except OSError as error:  # of the disk: the place's are CheckpointErrors
            log.error("a checkpoint is not %s: %s", self._place.done, error)
            return LOST
        return DONE

    def _gives_up(self) -> bool:
        if self._ending_since is None or self._failing_since is None:
            return False
        return time.monotonic() - max(self._ending_since, self._failing_since) > GIVE_UP_AFTER_S

    def _copy_files(self, copy: Copy) -> None:
        should_stop = partial(self._should_stop, copy)

        def copy_file(file: str) -> None:
            self._repeat(partial(self._place.copy_file, copy, file, should_stop), copy)

        with ThreadPoolExecutor(self._place.parallel_files, "copy-file") as pool:
            list(pool.map(copy_file, copy.files))

    def _should_stop(self, copy: Copy | None) -> bool:
        return self._closed.is_set() or (copy is not None and copy.is_dropped.is_set())

    def _repeat(self, do: Callable[[], None], copy: Copy | None = None) -> None:
        """Does it, for a copy, until the place does not fail. Raises Stopped."""
        pause = FIRST_PAUSE_S
        while not self._should_stop(copy):
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
