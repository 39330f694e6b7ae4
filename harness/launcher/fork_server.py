"""How the processes of `harness.launch` take a signal until their run handles it.

The process that they are forked from imports this before all else, and is itself unmoved: a signal
to all processes, as of Ctrl-C or of a terminal that is closed, is for the ranks, which end with it.
A rank whose run has not begun, or has ended, has nothing to save and dies of it without a word.
"""

import os
import signal

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stacks of C++ when a rank is lost
_SERVER = os.getpid()
_ENDING = [
    number
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN
]


def end_by_signals() -> None:
    """Of a rank: from now on a signal also ends it while it waits in C++, as for others to join the
    world, where Python calls no handler."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: object) -> None:
    if os.getpid() != _SERVER:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


for _number in _ENDING:
    signal.signal(_number, _end)
