"""How a command of rank 0 reaches every rank at the same step."""

import logging
import queue

from harness import distributed
from harness.control.commands import Command, parse
from harness.errors import CommandError

log = logging.getLogger(__name__)


class Bus:
    """A queue on rank 0, and one small agreement a step that hides behind the step's work.

    At the end of each step the ranks start to agree whether commands are waiting, and at the end
    of the next one they look at the answer; only if there are some are they sent.
    """

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._agreement = distributed.Agreement()

    def submit(self, line: str) -> None:
        """Queues a control line, on rank 0 (from any thread), or says what is wrong with it."""
        try:
            parse(line)
        except CommandError as error:
            log.error("command rejected: %s", error)
        else:
            self._waiting.put(line)

    def poll(self) -> list[Command]:
        """The commands to apply now, the same on every rank. Call it once a step on every rank."""
        lines: list[str] = []
        if self._agreement.harvest() == [1]:
            lines = distributed.broadcast(self._take())
        self._agreement.start([not self._waiting.empty()])
        return [parse(line) for line in lines]

    def close(self) -> None:
        """Ends the last agreement, and says which commands came too late."""
        self._agreement.harvest()
        for line in self._take():
            log.error("command %r came too late: the run is over", line)

    def _take(self) -> list[str]:
        lines = []
        while not self._waiting.empty():
            lines.append(self._waiting.get())
        return lines
