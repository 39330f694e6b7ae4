"""Where commands come from: rank 0's standard input."""

import logging
import os
import select
import stat
import sys
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

LONGEST_LINE = 64 * 1024


class StdinFront:
    """A daemon thread that gives every line of standard input to `submit`.

    It reads the raw file descriptor and splits lines itself, since a buffered reader would keep
    back lines that have arrived and would block on half a one. A closed stdin, /dev/null and the
    end of a pipe retire it quietly; a job in a terminal's background waits until it is in the
    foreground again.
    """

    def __init__(self, submit: Callable[[str], None]):
        self._submit = submit
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
