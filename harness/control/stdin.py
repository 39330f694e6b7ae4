"""Standard input as a front: every line of rank 0's is a command."""

import logging
import os
import select
import stat
import sys
import threading

from harness.control.bus import Bus
from harness.control.wire import LAST, LONGEST_LINE, Answer
from harness.utils import say, user_name

log = logging.getLogger(__name__)

SECONDS_AFTER_A_WRONG_LINE = 0.05


class StdinFront:
    """A daemon thread that gives every line of standard input to the bus.

    It reads the raw file descriptor and splits lines itself, since a buffered reader would keep
    back lines that have arrived and would block on half a one. A closed stdin, /dev/null and the
    end of a pipe retire it quietly; a job in a terminal's background waits until it is in the
    foreground again. It reads no faster than commands are obeyed, nor floods the log with the
    mistakes of a stream that was not meant for it.
    """

    def __init__(self, bus: Bus):
        self._bus = bus
        self._stopped = threading.Event()
        descriptor = _stdin_descriptor()
        if descriptor is not None:
            threading.Thread(
                target=self._read, args=(descriptor,), name="stdin", daemon=True
            ).start()

    def close(self) -> None:
        """Reads no further line."""
        self._stopped.set()

    def _read(self, descriptor: int) -> None:
        rest, too_long = b"", False
        while not self._stopped.is_set():
            try:
                ready, _, _ = select.select([descriptor], [], [], 0.2)
                if not ready:
                    continue
                if not _may_read(descriptor):
                    self._stopped.wait(0.5)
                    continue
                chunk = os.read(descriptor, 65536)
            except (OSError, ValueError) as error:
                log.warning("stdin can no longer be read: %s", error)
                return
            *lines, rest = (rest + chunk).split(b"\n")
            if too_long and (lines or not chunk):  # here that line ends
                lines, too_long = lines[1:], False
            if not chunk:
                lines, rest = [rest], b""
            for line in lines:
                text = line.decode(errors="replace").strip()
                if text and not self._stopped.is_set():
                    self._submit(text)
            if not chunk:
                return
            if too_long or len(rest) > LONGEST_LINE:
                if not too_long:
                    log.error("stdin: dropped a line of more than %d bytes", LONGEST_LINE)
                rest, too_long = b"", True

    def _submit(self, text: str) -> None:
        while self._bus.is_full and not self._stopped.wait(0.1):
            pass
        if not self._bus.submit(text, "stdin", user_name(os.getuid()), _show):
            self._stopped.wait(SECONDS_AFTER_A_WRONG_LINE)


def _show(answer: Answer) -> None:
    """Shows what the log does not: what was wrong with a line, what a query is answered, and on
    what level of the log ever the end of a command."""
    if answer.state == "rejected":
        log.error("command rejected: %s", answer.result)
    elif answer.state in LAST and (answer.step is None or not log.isEnabledFor(logging.INFO)):
        say(f"{answer.text}: {answer.result}")


def _stdin_descriptor() -> int | None:
    """The descriptor of standard input, or None if it is closed."""
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):
        return None
    return None if stat.S_ISDIR(mode) else descriptor


def _may_read(descriptor: int) -> bool:
    """False if reading would stop this process: a terminal whose foreground job is another."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # no terminal, or not ours to be stopped by
        return True
