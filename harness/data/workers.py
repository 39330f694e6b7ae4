"""The end of a DataLoader's worker processes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS_TO_END = 5.0
"""What workers have to finish what they are reading."""


@contextmanager
def iterated(loader: Any) -> Iterator[Iterator[Any]]:
    """An iterator of a DataLoader, whose workers end with the context."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        end_workers(iterator)


def end_workers(iterator: Any) -> None:
    """Ends the workers of a DataLoader's iterator, if it has any, within seconds.

    Dropping the iterator does not suffice: the traceback of an exception may refer to it. And
    workers ignore the SIGTERM that Python sends at its exit, before it waits for them.
    """
    workers = getattr(iterator, "_workers", ())
    if not workers:
        return

    def kill() -> None:
        for worker in workers:
            worker.kill()

    timer = threading.Timer(SECONDS_TO_END, kill)
    timer.start()
    try:
        iterator._shutdown_workers()
    finally:
        timer.cancel()
        kill()
