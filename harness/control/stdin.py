"""Standard input of rank 0 as a front: each line is a command."""

import logging
import os
import select
import stat
import sys
import threading

from harness.control.bus import Bus
from harness.control.wire import FINAL_STATES, MAX_LINE, Answer, user_name
from harness.logs import write_to_terminal

log = logging.getLogger(__name__)

SECONDS_AFTER_A_REJECTED_LINE = 0.05


class StdinFront:
    """A daemon thread that submits every line of standard input to the bus.

    It reads the raw file descriptor and splits lines itself: a buffered reader would hold back
    complete lines and block on an incomplete one. It ends silently at a closed stdin, /dev/null or
    the end of a pipe; a background job reads again once it is in the foreground. It reads no faster
    than commands are executed, and slows down after rejected lines, in case the stream is not meant
    for it.
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
        """Stops reading."""
        self._stopped.set()

    def _read(self, descriptor: int) -> None:
        rest, too_long = b"", False
        while not self._stopped.is_set():
            try:
                ready, _, _ = select.select([descriptor], [], [], 0.2)
                if not ready:
                    continue
                if not _is_foreground(descriptor):
                    self._stopped.wait(0.5)
                    continue
                chunk = os.read(descriptor, 65536)
            except (OSError, ValueError) as error:
                log.warning("cannot read stdin any more: %s", error)
                return
            *lines, rest = (rest + chunk).split(b"\n")
            if too_long and (lines or not chunk):  # the long line ends in this chunk
                lines, too_long = lines[1:], False
            if not chunk:
                lines, rest = [rest], b""
            for line in lines:
                text = line.decode(errors="replace").strip()
                if text and not self._stopped.is_set():
                    self._submit(text)
            if not chunk:
                return
            if too_long or len(rest) > MAX_LINE:
                if not too_long:
                    log.error("stdin: dropped a line longer than %d bytes", MAX_LINE)
                rest, too_long = b"", True

    def _submit(self, text: str) -> None:
        while self._bus.is_full and not self._stopped.wait(0.1):
            pass
        if not self._bus.submit(text, "stdin", user_name(os.getuid()), _show):
            self._stopped.wait(SECONDS_AFTER_A_REJECTED_LINE)


def _show(answer: Answer) -> None:
    """Shows what is not logged: why a line was rejected, the answers to queries, and, if the log
    level is above INFO, the results of commands."""
    is_logged = answer.step is not None and log.isEnabledFor(logging.INFO)
    if answer.state == "rejected":
        log.error("command rejected: %s", answer.result)
    elif answer.state in FINAL_STATES and not is_logged:
        write_to_terminal(f"{answer.text}: {answer.result}")


def _stdin_descriptor() -> int | None:
    """The descriptor of standard input; None if it is closed or a directory."""
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):
        return None
    return None if stat.S_ISDIR(mode) else descriptor


def _is_foreground(descriptor: int) -> bool:
    """False for a background job on a terminal: reading would stop the process."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # not a terminal, or not our controlling one
        return True
