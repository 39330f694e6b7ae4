"""The stacks of a rank that hangs, though its interpreter may be stuck.

The rank registers `faulthandler` for a signal: its C code writes the Python stacks of all threads
without the interpreter's lock, into memory that the watchdog holds as well.
"""

import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

SIGNAL = signal.SIGRTMIN + 12
"""Neither of harness nor, as far as known, of a library."""
SECONDS_TO_WRITE = 1.0
SECONDS_OF_PY_SPY = 10.0
COLLECTIVES = "distributed_c10d.py"
"""torch's file that has them."""
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


_memory: int | None = None  # of this process


def answer_in_memory() -> int:
    """In the rank: from now on `SIGNAL` makes it write its stacks into memory, whose descriptor is
    returned."""
    global _memory
    if _memory is None:
        _memory = os.memfd_create("harness-stacks")
    faulthandler.register(SIGNAL, file=_memory, all_threads=True)
    return _memory


def stacks_of(process: int, file: int) -> str:
    """The Python stacks of a process that writes them into this memory; empty if it does not."""
    before = os.fstat(file).st_size
    os.kill(process, SIGNAL)
    size, end = before, time.monotonic() + SECONDS_TO_WRITE
    while time.monotonic() < end:
        time.sleep(0.05)
        grown = os.fstat(file).st_size
        if grown > before and grown == size:
            break
        size = grown
    return os.pread(file, max(0, size - before), before).decode(errors="replace")


def native_stacks_of(process: int) -> str:
    """Its native stacks, by py-spy; empty where that is not installed."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("py-spy", path=places)
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "dump", "--native", "--nonblocking", "--pid", str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=SECONDS_OF_PY_SPY,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"py-spy has not answered within {SECONDS_OF_PY_SPY:g} s\n"
    return done.stdout.decode(errors="replace")


def place_in(stacks: str) -> str:
    """Where the main thread is: the collective if it is in one, and the innermost line of the task
    or of harness. Empty if that is not known."""
    frames = _frames_of_main(stacks)
    names = [frame["name"] for frame in frames if frame["file"].endswith(COLLECTIVES)]
    shown = ([frame for frame in frames if _is_own(frame)] or frames)[:1]
    lines = [f"{f['name']} ({Path(f['file']).name}:{f['line']})" for f in shown]
    return " of ".join([*names[-1:], *lines])


def waits_for_others(stacks: str) -> bool:
    """Whether the main thread is known to be in a collective."""
    inner = takewhile(lambda frame: not _is_own(frame), _frames_of_main(stacks))
    return any(
        "/torch/distributed/" in frame["file"]
        or "/harness/distributed/" in frame["file"]
        or ("/deepspeed/" in frame["file"] and frame["name"] == "wait")
        for frame in inner
    )


def _frames_of_main(stacks: str) -> list[re.Match[str]]:
    """From the innermost."""
    _, _, main = stacks.partition("Current thread")  # the one that the kernel gives signals first
    return [match for line in main.splitlines() if (match := _FRAME.fullmatch(line))]


def _is_own(frame: re.Match[str]) -> bool:
    """Whether it is the task's, or harness's beyond its messages between ranks."""
    ours = ("/harness/distributed/", "/harness/waiting.py")
    libraries = (os.sep + "site-packages" + os.sep, sys.prefix, sys.base_prefix, *ours)
    return not any(library in frame["file"] for library in libraries)
