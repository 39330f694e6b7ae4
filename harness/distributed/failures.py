"""How the ranks of a run fail: told to each other without a collective.

A rank that fails cannot call a collective: the others may be in another one. So each rank writes
into the store of the process group how it fails, and a thread of each rank looks there, and at the
processes of the other ranks on its node. A rank whose peers have failed leaves as well: its
collectives are aborted, so that it need not wait for their timeout.
"""

import hashlib
import json
import logging
import os
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.distributed import (
    DistError,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
)

from harness.distributed.abort import abort_collectives
from harness.distributed.collectives import all_gather, broadcast, raise_on_all_ranks
from harness.distributed.failure import Failure, at, lost_rank, unknown_end
from harness.distributed.meeting import answer, arrive, meet
from harness.distributed.network import is_lost_rank, local_cause
from harness.distributed.peers import Place
from harness.distributed.rendezvous import own_connection
from harness.distributed.world import global_rank, world_size
from harness.errors import LostRank, is_on_all_ranks, no_exit, summary

log = logging.getLogger(__name__)

SECONDS_TO_ANSWER = 3.0
"""How long a rank that has lost another one waits for the others to tell why."""
SECONDS_TO_ARRIVE = 5.0
"""How long a rank that fails in a command waits for the others to come to its end."""
SECONDS_TO_FAIL_ALIKE = 2.0
"""How long rank 0, which fails alone, waits for others that fail in the same way."""
FAILED = "failed"
"""The key that has the failure of the first rank that has failed alone."""
ENDING = "ending"
"""The key that is set once a rank has failed alone, or has lost another one: all end."""
TOLD = "told"
"""The key that has the ranks that end, in whichever way."""

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_NOTICE = 2.0
"""What a rank has to find out by itself that another one has failed, before it is made to."""
SECONDS_TO_LEAVE = 12.0
"""What it has to end after that, before its process is ended."""


class Failures:
    """What the ranks of a run tell each other of their failures. A context, left with the run."""

    def __init__(
        self,
        timeout_s: float,
        file: int | None = None,
        read: Callable[[int], tuple[int, str]] | None = None,
    ) -> None:
        """`timeout_s`: of every collective, for messages. Collective.

        `file`: a descriptor of a file in memory that tells what this rank is doing; `read`: the
        step and the phase in such a file, also of a rank that has died.
        """
        self.timeout_s = timeout_s
        self._read = read
        self._places = all_gather(Place.own(file))
        self._files = {rank: place.open_file() for rank, place in enumerate(self._places)}
        others = [rank for rank in range(world_size()) if rank != global_rank()]
        self._processes = {
            descriptor: rank
            for rank in others
            if (descriptor := self._places[rank].open_process()) is not None
        }
        # After this, each rank may end: the others have found it.
        self._prefix = f"harness/failures/{broadcast(uuid.uuid4().hex)}"
        self._store: Any = None
        self._told = False
        self._places_met = 0
        self._is_alone = False
        """Whether others have not come to a place where this rank has failed."""
        self._lost: set[int] = set()
        """The ranks that this one has lost."""
        self._ended: set[int] = set()
        """The ranks of this node whose processes have ended without a word."""
        self._left = threading.Event()
        self._wake, self._waking = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)

    def __enter__(self) -> Self:
        global _current
        _current = self
        if world_size() > 1:
            store = own_connection(dist.distributed_c10d._get_default_store())
            self._store = PrefixStore(self._prefix, store)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _current
        _current = None
        fails_alone = error is not None and not (is_on_all_ranks(error) or is_lost_rank(error))
        self.tell(summary(error) if error is not None and fails_alone else "")
        waits = fails_alone or bool(self._lost)
        self._leave_store(waits=waits and global_rank() == 0)
        self._left.set()
        os.close(self._waking)
        if self._store is not None:
            self._thread.join(SECONDS_TO_ANSWER)
        if not self._thread.is_alive():  # else it waits for a store that does not answer
            for descriptor in (self._wake, *self._processes, *filter(None, self._files.values())):
                os.close(descriptor)

    def _leave_store(self, waits: bool) -> None:
        """Tells the others that this rank needs the store no more. `waits`, as rank 0 has to:
        until they do not either, also those who wait for this rank in a collective."""
        if (store := self._store) is None:
            return
        answer(lambda: store.set(f"left/{global_rank()}", "1"), SECONDS_TO_ANSWER)
        if waits and not self._have_left(store, SECONDS_TO_FAIL_ALIKE):
            abort_collectives()
            self._have_left(store, SECONDS_TO_ANSWER)

    def _have_left(self, store: PrefixStore, seconds: float) -> bool:
        """Whether within so long all others have left the store, or their processes have ended."""
        processes, end = select.poll(), time.monotonic() + seconds
        for descriptor in self._processes:
            processes.register(descriptor, select.POLLIN)
        while time.monotonic() < end:
            ended = {self._processes[descriptor] for descriptor, _ in processes.poll(0)}
            left = [f"left/{rank}" for rank in set(range(world_size())) - ended - self._lost]
            if answer(partial(store.check, left), SECONDS_TO_ANSWER) is not False:
                return True
            time.sleep(0.1)
        return False

    def next_place(self) -> str:
        """The name of a place in the program that all ranks come to, in the same order."""
        self._places_met += 1
        return f"place {self._places_met}"

    def arrive(self, place: str) -> None:
        """Tells the others that this rank has come to a place. Does not wait for them."""
        if (store := self._store) is not None:
            answer(lambda: arrive(store, place), SECONDS_TO_ANSWER)

    def all_arrive(self, place: str) -> bool:
        """Tells that, and waits some seconds for the others. False if some do not come: they may
        wait for this rank in a collective."""
        if (store := self._store) is None:
            return True
        met = answer(lambda: meet(store, place, SECONDS_TO_ARRIVE), SECONDS_TO_ARRIVE + 1)
        self._is_alone = not met
        return not self._is_alone

    def exchange(self, text: str, reads: bool) -> list[str] | None:
        """What all ranks tell, by rank, of which some may have failed or lost another one: on a
        rank that `reads`. None if some do not within seconds, and on others. Blocks."""
        if (store := self._store) is None or self._ended:
            return None if self._ended else [text]
        keys = [f"exchange/{rank}" for rank in range(world_size())]

        def ask() -> list[str] | None:
            store.set(keys[global_rank()], text)
            if not reads:
                return None
            store.wait(keys, timedelta(seconds=SECONDS_TO_ARRIVE))
            return [told.decode() for told in store.multi_get(keys)]

        return answer(ask, SECONDS_TO_ARRIVE + 1)

    def is_joint(self, how: str, timeout_s: float) -> bool:
        """Whether every rank calls this, with the same text and within `timeout_s`. Blocks."""
        if (store := self._store) is None or self._is_alone:
            return store is None
        same = f"joint/{hashlib.sha256(how.encode()).hexdigest()}"

        def ask() -> bool:
            store.add(same, 1)
            return meet(store, "joint", timeout_s) and store.add(same, 0) == world_size()

        return answer(ask, timeout_s + 1) or False

    def tell(self, reason: str, step: int | None = None, phase: str | None = None) -> None:
        """Tells the other ranks, once, why this one fails alone, so that they end as well. With an
        empty reason: that it ends in order, or because another one fails."""
        if (store := self._store) is None or self._told:
            return
        self._told = True
        failure = Failure(global_rank(), socket.gethostname(), reason, step, phase)

        def do() -> None:
            _tell_end(store)
            if reason:
                store.compare_set(FAILED, "", json.dumps(asdict(failure)))
                store.set(ENDING, "1")

        answer(do, SECONDS_TO_ANSWER)

    def lost_rank(self, reason: str) -> LostRank:
        """The error of a rank that has lost others, which names them. Blocks until they have told
        why, for seconds at most. `reason`: as this rank knows it."""
        if (store := self._store) is None:
            return lost_rank([], reason, self._what_happened())
        self.tell("")
        answer(lambda: store.set(ENDING, "1"), SECONDS_TO_ANSWER)
        told: set[int] = set()
        first = answer(lambda: self._ask_all(told), SECONDS_TO_ANSWER + 1)
        if first is not None:
            error = LostRank(f"{first}. This rank ends, as it cannot continue without that one")
            error.rank, error.host = first.rank, first.host
            error.step, error.phase = first.step, first.phase
            return error
        lost = sorted(self._ended or set(range(world_size())) - told - {global_rank()})
        if not (told or self._ended):  # the store is gone, and is on the node of rank 0
            lost = [0] if global_rank() else []
        self._lost |= set(lost)
        error = lost_rank([self._describe(rank) for rank in lost], reason, self._what_happened())
        if lost:
            error.rank, error.host = lost[0], self._places[lost[0]].host
            error.step, error.phase = self._last_of(lost[0]) or (None, None)
        return error

    def _describe(self, rank: int) -> str:
        last = self._last_of(rank)
        was = f", which was in {at(*last)}" if last else ""
        return f"rank {rank} on {self._places[rank].host}{was}"

    def _last_of(self, rank: int) -> tuple[int, str] | None:
        """Step and phase that a rank of this node was in."""
        file = self._files[rank]
        return None if file is None or self._read is None else self._read(file)

    def _what_happened(self) -> str:
        if self._ended:
            return "its process was killed, perhaps for lack of memory, or has crashed"
        return unknown_end(self.timeout_s)

    def _ask_all(self, told: set[int]) -> Failure | None:
        """The first failure, if one is told before all ranks have told that they end. `told`: is
        filled with the ranks that have."""
        store, end, pause = self._store, time.monotonic() + SECONDS_TO_ANSWER, 0.1
        while store is not None and time.monotonic() < end:
            with suppress(DistError):  # it may go with its rank, whose end will be noticed
                if store.check([FAILED]):
                    return Failure(**json.loads(store.get(FAILED)))
                told.update(map(int, store.get(TOLD).split()))
            if self._ended or len(told) == world_size():
                break
            time.sleep(pause)
            pause *= 2  # of ten thousand ranks that ask one store
        return None

    def _watch(self) -> None:
        """Waits until another rank fails, and makes this one leave."""
        poll = select.poll()
        for descriptor in (self._wake, *self._processes):
            poll.register(descriptor, select.POLLIN)
        try:
            has_failed = self._wait(poll)
        except DistError:  # the store is gone, with its rank: at the end of the run, or before
            self._look(poll)
            has_failed = None
        if has_failed is False or self._left.wait(SECONDS_TO_NOTICE):
            return
        abort_collectives()
        if not self._left.wait(SECONDS_TO_LEAVE) and has_failed:
            log.error("another rank has failed, and this one does not end: ending its process")
            os._exit(LostRank.code)

    def _wait(self, poll: "select.poll") -> bool:
        """Waits until another rank has failed, or this one leaves; whether one has failed.

        If one is lost, only those that exchange messages with it find out. So they are told, and
        this rank tells at once that it ends: those that do not are the lost ones.
        """
        store = self._store
        assert store is not None
        while self._look(poll):
            self._ended -= {rank for rank in self._ended if store.check([_told(rank)])}
            if self._ended:
                store.set(ENDING, "1")
            if self._ended or store.check([ENDING]):
                _tell_end(store)
                return True
        return False

    def _look(self, poll: "select.poll") -> bool:
        """Waits a while for ranks of this node to end. False if this one leaves."""
        for descriptor, _ in poll.poll(1000 * SECONDS_BETWEEN_LOOKS):
            if descriptor == self._wake:
                return False
            poll.unregister(descriptor)
            self._ended.add(self._processes[descriptor])
        return True


_current: Failures | None = None
"""Of the run in progress."""


def current() -> Failures:
    """Those of the run in progress."""
    assert _current is not None, "no run is in progress"
    return _current


@contextmanager
def raise_together(doing: str) -> Iterator[None]:
    """`raise_on_all_ranks` around a body that may contain collectives, within a run.

    The other ranks may wait in one for a rank that fails. If they do not come to the end of the
    body within seconds, that rank raises its error alone.
    """
    failures, failure = current(), None
    place = failures.next_place()
    try:
        with no_exit():
            yield
        failures.arrive(place)
    except Exception as error:
        failure = error
        if is_lost_rank(error) or not (is_on_all_ranks(error) or failures.all_arrive(place)):
            raise
    with raise_on_all_ranks(doing):
        if failure is not None:
            raise failure


@contextmanager
def raise_lost_rank(timeout_s: float) -> Iterator[None]:
    """Turns the error of a collective, if a rank is gone or hangs, into a LostRank that names it;
    and into a ConfigError if the cause is on this machine.

    `timeout_s`: of every collective, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if cause := local_cause(error):
            raise cause from error
        if not is_lost_rank(error):
            raise
        reason = str(error).rpartition("/gloo/")[2].partition("] ")[2] or str(error)
        reason = reason.partition(" This is typically")[0].rstrip(".")
        if _current is None:
            raise lost_rank([], reason, unknown_end(timeout_s)) from error
        raise _current.lost_rank(reason) from error


def _tell_end(store: Any) -> None:
    store.set(_told(global_rank()), "1")
    store.append(TOLD, f"{global_rank()} ")


def _told(rank: int) -> str:
    """The key that is set once a rank has told that it ends."""
    return f"told/{rank}"
