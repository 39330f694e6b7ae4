"""How a command from any front reaches every rank after the same step, and how it is answered."""

import itertools
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness import distributed
from harness.control.audit import Audit
from harness.control.commands import Command, Interrupt, Query, Save
from harness.control.grammar import Grammar
from harness.control.signals import STOPPING, Signals
from harness.control.wire import FINAL_STATES, Answer, CommandState
from harness.errors import CommandError

log = logging.getLogger(__name__)

MAX_QUEUED = 1000
SECONDS_BETWEEN_EXCHANGES = 0.05
MAX_SKIPPED = 4
"""Most exchanges to skip, even if they come fast: the next ones may be slow."""
FLAGS = 1 + len(STOPPING) + 1
"""Commands waiting; received: a signal that ends the run, for each of them; one that saves."""

ENDING = "the run is already ending"
"""Why commands are rejected or fail at the end of the run."""

Reply = Callable[[Answer], None]
Reported = tuple[str, dict[str, Any] | None]
"""The answer to a query: for people, and perhaps as numbers."""


@dataclass(frozen=True)
class Ticket:
    """A command between its front and its final answer."""

    id: int
    """Its number in the audit log; of an event, 0 on ranks other than 0."""
    front: str
    user: str
    text: str
    command: Command


class Bus:
    """A queue on rank 0, and a part of the step's vector.

    Into each vector go flags: does rank 0 have commands waiting, has any rank received a signal?
    Only if there are commands does rank 0 broadcast them, once the vector has been summed. Every
    command gets exactly one final answer, from `submit`, `end` or `close`.
    """

    def __init__(
        self,
        grammar: Grammar,
        signals: Signals,
        answer: Callable[[Query], Reported],
        audit: Audit | None,
    ):
        """`answer` answers queries; `audit` is the audit log, None on ranks other than 0."""
        self._grammar = grammar
        self._signals = signals
        self._answer = answer
        self._audit = audit
        self._ids = itertools.count(1 if audit is None else audit.last_id + 1)
        self._queue: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self._pending: dict[int, tuple[Ticket, Reply]] = {}  # by id, without a final answer
        self._lock = threading.Lock()  # ids, queue and audit log in one order
        self._is_open = True
        self._flags = [0] * FLAGS
        """Commands waiting, and ranks that received each signal, since the last `poll`."""
        self._to_skip = 0  # exchanges that are not needed
        self._exchanged_at: float | None = None

    @property
    def is_full(self) -> bool:
        """Whether `submit` would reject any command."""
        return self._queue.qsize() >= MAX_QUEUED

    def submit(self, text: str, front: str, user: str, reply: Reply) -> bool:
        """Accepts a control line on rank 0, from any thread. Returns False if it is rejected.

        `reply` is called, from any thread, with each answer to it.
        """
        ticket = Ticket(next(self._ids), front, user, text, Command())
        try:
            command = self._grammar.parse(text)
            if isinstance(command, Query):
                result, values = self._answer(command)
                reply(Answer(ticket.id, text, "done", result=result, values=values))
                return True
            ticket = replace(ticket, command=command)
            with self._lock:
                if not self._is_open:
                    raise CommandError(ENDING)
                if self.is_full:
                    raise CommandError(f"{MAX_QUEUED} commands are queued; try again later")
                self._pending[ticket.id] = (ticket, reply)
                self._publish(ticket, "queued")
                self._queue.put(ticket)
        except Exception as error:
            if not isinstance(error, CommandError):  # our own bug must not kill the front
                log.exception("command %.300r", text)
            self._publish(ticket, "rejected", result=str(error), reply=reply)
            return False
        return True

    def poll(self, step: int) -> list[Ticket]:
        """The commands that exchanges have announced, the same on every rank.

        Collective if there are any. `step`: the last completed step.
        """
        if not any(self._flags):
            return []
        (_, *stops, save), self._flags = self._flags, [0] * FLAGS
        stop = max((n for n, count in zip(STOPPING, stops, strict=True) if count), default=0)
        tickets = distributed.broadcast(self._collect(stop, save))
        for ticket in tickets:
            self._publish(ticket, "agreed", step)
        return tickets

    def contribute(self) -> Sequence[float]:
        """The flags, and how many exchanges rank 0 would skip."""
        stop, save = self._signals.take()
        stops = [number == stop for number in STOPPING]
        return [not self._queue.empty(), *stops, save, self._exchanges_to_skip()]

    def receive(self, sums: Sequence[float]) -> None:
        """Adds the flags of all ranks to those that `poll` has not seen."""
        *flags, self._to_skip = map(int, sums)
        self._flags = [old + new for old, new in zip(self._flags, flags, strict=True)]

    def skips_exchange(self) -> bool:
        """Whether commands do not need the next exchange: the previous ones came fast.

        For loops other than over steps, in which nothing else needs it. The same on all ranks.
        """
        if self._to_skip:
            self._to_skip -= 1
            return True
        return False

    def _exchanges_to_skip(self) -> int:
        """From the time since the last exchange; 0 on ranks other than 0."""
        if not distributed.is_global_leader():
            return 0
        now, previous = time.monotonic(), self._exchanged_at
        self._exchanged_at = now
        if previous is None:
            return 0
        return min(MAX_SKIPPED, int(SECONDS_BETWEEN_EXCHANGES / max(now - previous, 1e-3)))

    def ticket(self, text: str, front: str) -> Ticket:
        """A ticket for a command that every rank already has, like that of a due event.

        Raises CommandError if this run does not know the command.
        """
        number = next(self._ids) if distributed.is_global_leader() else 0
        return Ticket(number, front, "", text, self._grammar.parse(text))

    def end(self, ticket: Ticket, state: CommandState, step: int, result: str) -> None:
        """Publishes the final answer to a command. Every rank calls it; only rank 0 acts."""
        if distributed.is_global_leader():
            level = logging.WARNING if state == "failed" else logging.INFO
            log.log(level, "step %d: %s: %s: %s", step, ticket.text, state, result)
        self._publish(ticket, state, step, result)

    def record(self, front: str, text: str, step: int, result: str) -> None:
        """Records in the audit log what the run has done by itself. Every rank calls it."""
        number = next(self._ids) if distributed.is_global_leader() else 0
        self.end(Ticket(number, front, "", text, Command()), "done", step, result)

    def close(self) -> None:
        """Rejects further commands, and fails the pending ones: the run is ending."""
        with self._lock:
            self._is_open = False
        for ticket, _ in list(self._pending.values()):
            log.warning("command %r: %s", ticket.text, ENDING)
            self._publish(ticket, "failed", result=ENDING)

    def _collect(self, stop: int, save: int) -> list[Ticket]:
        """On rank 0, the queued commands and those of the signals; empty on other ranks."""
        if not distributed.is_global_leader():
            return []
        tickets = [self._queue.get() for _ in range(self._queue.qsize())]
        if save:
            tickets.append(Ticket(next(self._ids), "signal", "", "SIGUSR1", Save()))
        if stop:
            name = signal.Signals(stop).name
            tickets.append(Ticket(next(self._ids), "signal", "", name, Interrupt(stop)))
        return tickets

    def _publish(
        self,
        ticket: Ticket,
        state: CommandState,
        step: int | None = None,
        result: str = "",
        reply: Reply | None = None,
    ) -> None:
        """Logs an answer in the audit log and passes it on. Does nothing on ranks other than 0."""
        if self._audit is None:
            return
        answer = Answer(ticket.id, ticket.text, state, step, result)
        source = {"front": ticket.front, "user": ticket.user}
        record = {key: value for key, value in asdict(answer).items() if key != "values"}
        self._audit.write({"time": time.time(), **source, **record})
        if ticket.id in self._pending:
            _, reply = self._pending[ticket.id]
            if state in FINAL_STATES:
                del self._pending[ticket.id]
        if reply is not None:
            reply(answer)
