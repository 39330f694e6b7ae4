"""How a command of rank 0 reaches every rank at the same step."""

import logging
import queue
import time

from harness import distributed
from harness.control.commands import Command, parse
from harness.errors import CommandError

log = logging.getLogger(__name__)

LONGEST_QUEUE = 100
SECONDS_AFTER_A_WRONG_LINE = 0.05


class Bus:
    """A queue on rank 0, and one small agreement a step that hides behind the step's work.

    At the end of each step the ranks start to agree whether commands are waiting, and at the end
    of the next one they look at the answer; only if there are some are they sent.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[str] = queue.Queue(LONGEST_QUEUE)
        self._agreement = distributed.Agreement()

    def submit(self, line: str) -> None:
        """Queues a control line, on rank 0, or says what is wrong with it.

        To be called from a front's own thread: it waits while the queue is full, and a moment after
        a wrong line, so that a flood of lines stays where it comes from.
        """
        try:
            parse(line)
        except CommandError as error:
            log.error("command rejected: %.300s", error)
            time.sleep(SECONDS_AFTER_A_WRONG_LINE)
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
        return [self._waiting.get() for _ in range(self._waiting.qsize())]
