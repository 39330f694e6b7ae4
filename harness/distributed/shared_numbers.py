"""What each rank has noted down, readable for the others even after its process has died.

A collective whose sizes differ between the ranks can end a process at once (gloo calls abort), so a
rank may be unable to tell the others what it did.
"""

import mmap
import os
import secrets
import threading
from array import array
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import (
    DistError,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
)

from harness.distributed.collectives import all_gather, barrier

NAME = "harness-numbers"
TOKEN, ROUND, LENGTH, START = range(4)
"""Where what is: a number that identifies the memory, the round, the length, the numbers."""


class SharedNumbers:
    """A list of integers of each rank in the current round, in memory that the ranks of a node
    share: to note some down takes about a microsecond."""

    def __init__(self, capacity: int):
        """`capacity`: how many numbers of a round are kept, the first ones. Collective."""
        size = 8 * (START + capacity)
        file = os.memfd_create(NAME)  # gone with the last process that maps it
        os.truncate(file, size)
        self._own = _mapped(file, size)
        self._own[TOKEN] = secrets.randbits(62)
        places = all_gather((f"/proc/{os.getpid()}/fd/{file}", size, self._own[TOKEN]))
        self._by_rank = [_find(*place) for place in places]
        """None for the ranks of other nodes."""
        self._prefix = f"harness/shared_numbers/{places[0][2]}"
        barrier()
        os.close(file)

    def next_round(self) -> None:
        """Counts a round, which every rank does at the same point."""
        self._own[ROUND] += 1

    def clear(self) -> None:
        """Forgets this rank's numbers."""
        self._own[LENGTH] = 0

    def add(self, numbers: Sequence[int]) -> None:
        """Appends to this rank's numbers."""
        start = START + self._own[LENGTH]
        end = min(start + len(numbers), len(self._own))
        self._own[start:end] = array("q", numbers[: end - start])
        self._own[LENGTH] = end - START

    def read(self, timeout_s: float) -> list[Sequence[int] | None]:
        """The numbers by rank: None for a rank in another round, and for one of another node if no
        rank of that node calls this within `timeout_s`. Blocks."""
        texts = [b"" if view is None else view.tobytes() for view in self._by_rank]
        if not all(texts):
            texts = self._exchange(texts, timeout_s)
        found = [array("q", text) for text in texts]
        return [
            numbers[START : START + numbers[LENGTH]]
            if numbers and numbers[ROUND] == self._own[ROUND]
            else None
            for numbers in found
        ]

    def _exchange(self, texts: Sequence[bytes], timeout_s: float) -> list[bytes]:
        """Adds those of the other nodes, through the store of the process group.

        In a thread: a store that cannot be reached any more, as after a cut cable, never answers.
        """
        found = list(texts)
        thread = threading.Thread(target=self._fill, args=(found, timeout_s), daemon=True)
        thread.start()
        thread.join(timeout_s + 1)
        return list(found)

    def _fill(self, texts: list[bytes], timeout_s: float) -> None:
        with suppress(DistError):  # not all in time, or the store is gone with its rank
            store: Any = PrefixStore(self._prefix, dist.distributed_c10d._get_default_store())
            near = [rank for rank, text in enumerate(texts) if text]
            store.multi_set([str(rank) for rank in near], [texts[rank] for rank in near])
            missing = [rank for rank, text in enumerate(texts) if not text]
            keys = [str(rank) for rank in missing]
            store.wait(keys, timedelta(seconds=timeout_s))
            for rank, text in zip(missing, store.multi_get(keys), strict=True):
                texts[rank] = text


def _mapped(file: int, size: int) -> memoryview:
    return memoryview(mmap.mmap(file, size)).cast("q")


def _find(path: str, size: int, token: int) -> memoryview | None:
    """The memory of a rank of this node; on another one there may be anything at the path."""
    try:
        if not str(Path(path).readlink()).startswith(f"/memfd:{NAME}"):
            return None
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if os.fstat(file).st_size == size and (view := _mapped(file, size))[TOKEN] == token:
            return view
        return None
    finally:
        os.close(file)
