"""How a command of any front reaches every rank at the same step, and how it is answered."""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from harness import distributed
from harness.control.audit import Audit
from harness.control.commands import Command, Interrupt, Query, Save
from harness.control.grammar import Grammar
from harness.control.signals import Signals
from harness.control.wire import LAST, Answer, State
from harness.errors import CommandError

log = logging.getLogger(__name__)

LONGEST_QUEUE = 1000
SECONDS_BETWEEN_AGREEMENTS = 0.05
MOST_SKIPPED = 4
"""Polls without an agreement, however fast they follow each other: the next ones may be slow."""

Reply = Callable[[Answer], None]


@dataclass(frozen=True)
class Ticket:
    """A command on its way."""

    id: int
    """Its number in the run directory's history; rank 0 alone knows that of an event."""
    front: str
    user: str
    text: str
    command: Command


class Bus:
    """A queue on rank 0, and one small agreement a step that hides behind the step's work.

    At the end of a step the ranks start to agree whether rank 0 has commands waiting and whether
    any rank was sent a signal, and at the end of the next one they look at the answer; only if
    there is something to send is it sent. Where steps are faster than anybody types, rank 0 has the
    ranks leave out some agreements. Every command is answered exactly once, in the end, by `end` or
    by `close`.
    """

    def __init__(
        self,
        grammar: Grammar,
        signals: Signals,
        answer: Callable[[Query], str],
        audit: Audit | None,
    ):
        """`answer` answers queries; `audit` is rank 0's history of commands, None elsewhere."""
        self._grammar = grammar
        self._signals = signals
        self._answer = answer
        self._audit = audit
        self._ids = itertools.count(1 if audit is None else audit.last_id + 1)
        self._queue: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self._replies: dict[int, tuple[Ticket, Reply]] = {}  # of the commands under way
        self._lock = threading.Lock()  # ids, queue and history in one order
        self._is_open = True
        self._agreement = distributed.AsyncAllReduceMax(size=4)
        self._skipped = 0
        """Polls without an agreement that are still to come."""
        self._polled_at: float | None = None

    @property
    def is_full(self) -> bool:
        """Whether `submit` would reject any command."""
        return self._queue.qsize() >= LONGEST_QUEUE

    def submit(self, text: str, front: str, user: str, reply: Reply) -> bool:
        """Takes a control line on rank 0, from any thread. False if it is rejected.

        `reply` is called for everything that becomes of it, from any thread.
        """
        ticket = Ticket(next(self._ids), front, user, text, Command())
        try:
            command = self._grammar.parse(text)
            if isinstance(command, Query):
                reply(Answer(ticket.id, text, "done", result=self._answer(command)))
                return True
            ticket = replace(ticket, command=command)
            with self._lock:
                if not self._is_open:
                    raise CommandError("it came too late: the run is over")
                if self.is_full:
                    raise CommandError(f"{LONGEST_QUEUE} commands are waiting: try again")
                self._replies[ticket.id] = (ticket, reply)
                self._tell(ticket, "queued")
                self._queue.put(ticket)
        except Exception as error:
            if not isinstance(error, CommandError):  # a mistake of ours must not end the front
                log.exception("command %.300r", text)
            self._tell(ticket, "rejected", result=str(error), reply=reply)
            return False
        return True

    def poll(self, step: int) -> list[Ticket]:
        """The commands to obey now, the same on every rank. Every rank calls it at the same place.

        `step`: the last one that was taken.
        """
        tickets: list[Ticket] = []
        skip = self._to_skip()
        agreed = self._agreement.harvest()
        if agreed is not None:
            *reasons, self._skipped = agreed
            if any(reasons):
                _, stop, save = reasons
                tickets = distributed.broadcast(self._take(stop, save))
            for ticket in tickets:
                self._tell(ticket, "agreed", step)
        if self._skipped:
            self._skipped -= 1
        else:
            self._agreement.start([not self._queue.empty(), *self._signals.take(), skip])
        return tickets

    def _to_skip(self) -> int:
        """How many polls rank 0 would leave out, as fast as they follow each other."""
        if not distributed.is_global_leader():
            return 0
        now, before = time.monotonic(), self._polled_at
        self._polled_at = now
        if before is None:
            return 0
        return min(MOST_SKIPPED, int(SECONDS_BETWEEN_AGREEMENTS / max(now - before, 1e-3)))

    def ticket(self, text: str, front: str) -> Ticket:
        """A ticket for what every rank knows without being told, like an event that is due.

        Raises CommandError if this run does not know the command.
        """
        number = next(self._ids) if distributed.is_global_leader() else 0
        return Ticket(number, front, "", text, self._grammar.parse(text))

    def end(self, ticket: Ticket, state: State, step: int, result: str) -> None:
        """Says what a command led to, on every rank; rank 0 tells it."""
        if distributed.is_global_leader():
            level = logging.WARNING if state == "failed" else logging.INFO
            log.log(level, "step %d: %s: %s: %s", step, ticket.text, state, result)
        self._tell(ticket, state, step, result)

    def finish(self) -> None:
        """Ends the last agreement, on every rank."""
        self._agreement.harvest()

    def close(self) -> None:
        """Takes no further command, and answers those that are left: they came too late."""
        with self._lock:
            self._is_open = False
        for ticket, _ in list(self._replies.values()):
            log.warning("command %r came too late: the run is over", ticket.text)
            self._tell(ticket, "failed", result="it came too late: the run is over")

    def _take(self, stop: int, save: int) -> list[Ticket]:
        """On rank 0 all that is waiting, and what signals to any rank amount to."""
        if not distributed.is_global_leader():
            return []
        tickets = [self._queue.get() for _ in range(self._queue.qsize())]
        if save:
            tickets.append(Ticket(next(self._ids), "signal", "", "SIGUSR1", Save()))
        if stop:
            name = self._signals.name(stop)
            tickets.append(Ticket(next(self._ids), "signal", "", name, Interrupt(stop)))
        return tickets

    def _tell(
        self,
        ticket: Ticket,
        state: State,
        step: int | None = None,
        result: str = "",
        reply: Reply | None = None,
    ) -> None:
        """Writes down what became of a command, and tells who waits for it. Only rank 0 does."""
        if self._audit is None:
            return
        answer = Answer(ticket.id, ticket.text, state, step, result)
        from_whom = {"front": ticket.front, "user": ticket.user}
        self._audit.write({"time": time.time(), **from_whom, **asdict(answer)})
        if ticket.id in self._replies:
            _, reply = self._replies[ticket.id]
            if state in LAST:
                del self._replies[ticket.id]
        if reply is not None:
            reply(answer)
