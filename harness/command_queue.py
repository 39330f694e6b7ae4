"""The commands of a run between its steps: received, scheduled, executed in order."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from harness import distributed
from harness.checkpoint.save import Saver, SaveResult
from harness.control.bus import ENDING, Bus, Ticket
from harness.control.commands import Interrupt, Query, Quit
from harness.control.live import LiveConfig
from harness.distributed import StepVector
from harness.engine.engines import Engines
from harness.errors import CommandError
from harness.metrics.status import Status

log = logging.getLogger(__name__)
log_error = distributed.global_leader_only(log.error)

SECONDS_BETWEEN_POLLS = 0.05  # of a paused run


class CommandedRun(Protocol):
    """What is commanded: a `trainer.Trainer`."""

    live: LiveConfig
    engines: Engines
    saver: Saver
    bus: Bus
    status: Status
    vector: StepVector
    paused: bool
    finishing: bool
    ending: Quit | None

    def is_over(self) -> bool: ...

    def execute(self, ticket: Ticket) -> None: ...

    def finish_save(self, result: SaveResult | None) -> None: ...

    def has_changed(self) -> None: ...


class CommandQueue:
    """Those that all ranks have received and not yet executed. Every rank calls the same methods
    between the same two steps."""

    def __init__(self, run: CommandedRun):
        self._run = run
        self._received: deque[Ticket] = deque()

    def handle(self) -> None:
        """Executes the events that are due and the commands received; waits while paused."""
        run = self._run
        self.receive()
        self.execute_all()
        if not run.paused:
            return
        with run.status.doing("paused"):
            while run.paused and not run.is_over():
                time.sleep(SECONDS_BETWEEN_POLLS)
                run.finish_save(run.saver.poll())
                self.poll()
                self.execute_all()

    def poll(self) -> bool:
        """`receive` in a loop that takes no steps: exchanges the vector for it."""
        if self._run.bus.skips_exchange():
            return False
        self._run.vector.exchange()
        return self.receive()

    def receive(self) -> bool:
        """Receives commands, to be executed once the work in progress has ended.

        True if that work should be aborted: by a signal, or by a `quit` since the last call.
        """
        new = self._run.bus.poll(self._run.engines.global_step)
        self._received.extend(new)
        return any(isinstance(ticket.command, Quit) for ticket in new) or any(
            isinstance(ticket.command, Interrupt) for ticket in self._received
        )

    def add(self, texts: Sequence[str], front: str) -> None:
        """Commands that every rank has, of callbacks. Raises CommandError if the run does not know
        one of them, or it only asks."""
        for text in texts:
            ticket = self._run.bus.ticket(text, front)
            if isinstance(ticket.command, Query):
                raise CommandError(f"{front}: {text!r} is answered to people only")
            self._received.append(ticket)

    def execute_all(self) -> None:
        """Executes the events that are due and the commands received, in order.

        Once the run is ending, only commands that change how it ends are executed.
        """
        run = self._run
        self.execute_events()
        while self._received:
            ticket = self._received.popleft()
            is_ending = run.finishing or run.ending is not None
            if not is_ending or isinstance(ticket.command, Quit):
                run.execute(ticket)
                self.execute_events()
            else:
                run.bus.end(ticket, "failed", run.engines.global_step, ENDING)

    def execute_events(self) -> None:
        """Executes the events that are due at this step."""
        run = self._run
        if run.finishing or run.ending is not None:
            return
        for event in run.live.events.due(run.engines.global_step):
            run.has_changed()  # a checkpoint of this step would still contain the event
            try:
                run.execute(run.bus.ticket(event.command, f"event {event.id}"))
            except CommandError as error:
                log_error("%s: removed: %s", event, error)
                run.live.events.clear(event.id)
            if run.ending is not None:  # the others stay pending
                return
