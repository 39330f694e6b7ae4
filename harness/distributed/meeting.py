"""What ranks tell each other through the store of the process group, without a collective.

Each asks the store a few times, whatever the number of ranks.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from torch.distributed import (
    DistError,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
)

from harness.distributed.world import world_size

T = TypeVar("T")


def arrive(store: Store, place: str) -> None:
    """Tells that this rank has come to a place. Does not wait for the others."""
    if store.add(f"{place}/count", 1) == world_size():  # the last one: others wait for the key
        store.set(f"{place}/all", "1")


def meet(store: Store, place: str, seconds: float) -> bool:
    """Tells that, and waits there for all ranks. Raises DistError if some do not come in time."""
    arrive(store, place)
    store.wait([f"{place}/all"], timedelta(seconds=seconds))
    return True


def answer(ask: Callable[[], T], seconds: float) -> T | None:
    """What `ask` returns of the store. None if the store is gone with its rank, or does not answer
    within `seconds`: one behind a cut cable never does."""
    found: list[T] = []

    def run() -> None:
        with suppress(DistError):
            found.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
