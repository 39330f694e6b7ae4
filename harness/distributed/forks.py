"""What a forked process, a data-loader worker for instance, must not keep of its rank.

A copy of a descriptor keeps its socket or pipe open when the rank has died: the other ranks would
wait for it until the timeout, and clients for an answer. The copies are closed right after a fork.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import stat
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_Identity = tuple[int, int]

_to_close: dict[int, _Identity] = {}
"""By descriptor; the identity tells whether it is still the same file."""


def close_in_forks(descriptor: int) -> None:
    """Processes forked from now on close their copy of an open descriptor."""
    identity = _identity(descriptor)
    assert identity is not None, f"descriptor {descriptor} is not open"
    _to_close[descriptor] = identity


@contextlib.contextmanager
def sockets_close_in_forks() -> Iterator[None]:
    """Processes forked later close their copies of the sockets that were opened in the context.

    For libraries that open sockets without naming them, as gloo does.
    """
    before = _open_sockets()
    try:
        yield
    finally:
        _to_close.update(_open_sockets().items() - before.items())


def end_with_parent() -> None:
    """Makes the kernel kill this process when the thread that forked it ends. Linux only.

    A data-loader worker that is busy or hangs would otherwise outlive its rank.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        # Under a fork server that is the parent, which ends with the rank.
        is_own = parent is None or parent.pid == os.getppid()
        if parent is not None and not is_own and not parent.is_alive():  # it ended before the call
            os._exit(1)


def open_descriptors() -> list[int]:
    """The descriptors that forked processes would close, as far as they are still open."""
    return [number for number, identity in _to_close.items() if _identity(number) == identity]


def _open_sockets() -> dict[int, _Identity]:
    numbers = [int(name) for name in os.listdir("/dev/fd")]  # noqa: PTH208 (no real directory)
    found = {number: _identity(number, only_sockets=True) for number in numbers}
    return {number: identity for number, identity in found.items() if identity}


def _identity(descriptor: int, only_sockets: bool = False) -> _Identity | None:
    """Device and inode; None if it is closed, or no socket."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    if only_sockets and not stat.S_ISSOCK(status.st_mode):
        return None
    return status.st_dev, status.st_ino


def _close() -> None:
    for descriptor in open_descriptors():
        os.close(descriptor)
    _to_close.clear()


os.register_at_fork(after_in_child=_close)
