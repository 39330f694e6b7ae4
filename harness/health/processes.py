"""What Linux tells of a process: whether it works, is stopped, or debugged.

Where /proc does not tell, it counts as working at nothing, not stopped, not debugged.
"""

import os
from contextlib import suppress
from pathlib import Path
from time import monotonic

WORKING_SHARE = 0.05
"""The share of one core from which on a process, with its children, counts as working."""
WORKING_BYTES = 2**17
"""The same in bytes read and written a second."""
_TICKS = os.sysconf("SC_CLK_TCK")


def is_stopped(process: int) -> bool:
    """Whether a signal has stopped it."""
    return _status(process).get("State", "").startswith("T")


def is_traced(process: int) -> bool:
    """Whether a debugger, or strace, is attached to it."""
    return _status(process).get("TracerPid", "0") != "0"


class Activity:
    """Whether a process works, together with its children: compilers, data-loader workers."""

    def __init__(self, process: int, without: int):
        """`without`: a child that does not count."""
        self._process = process
        self._without = without
        self._before = self._used()
        self._at = monotonic()

    def is_working(self) -> bool:
        """Since the last call."""
        used, now = self._used(), monotonic()
        seconds = max(now - self._at, 1e-3)
        ticks, size = (after - before for after, before in zip(used, self._before, strict=True))
        self._before, self._at = used, now
        return ticks / _TICKS > WORKING_SHARE * seconds or size > WORKING_BYTES * seconds

    def _used(self) -> tuple[int, int]:
        """Ticks of CPU time, and bytes, so far. A child that has ended takes its part along, which
        its parent has waited for or not."""
        ticks = size = 0
        waiting = [self._process]
        while waiting:
            process = waiting.pop()
            place = Path(f"/proc/{process}")
            with suppress(OSError, ValueError, IndexError):
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # own, and of children waited for
                for task in (place / "task").iterdir():
                    children = map(int, (task / "children").read_text().split())
                    waiting += [child for child in children if child != self._without]
                lines = (place / "io").read_text().splitlines()
                size += sum(int(line.split()[1]) for line in lines[:2])
        return ticks, size


def _status(process: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key: value.strip() for key, _, value in pairs}
