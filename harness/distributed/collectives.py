"""Small collectives on the control group: all-reduce, broadcast, gather, raising together."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from harness.distributed.world import control_group, world_size
from harness.errors import HarnessError, OutOfMemory, TaskError, kind_of, no_exit

T = TypeVar("T")


def all_reduce_max(vector: Sequence[int]) -> list[int]:
    """The elementwise maximum over all ranks. Blocks until every rank has called."""
    flags = torch.tensor(vector, dtype=torch.int64)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=control_group())
    return flags.tolist()


class AsyncAllReduceMax:
    """`all_reduce_max` in the background: `start` it, and `wait` for the result later.

    It is part of every step, so it calls the process group directly and accesses its `size` numbers
    through numpy, which takes half the time of the usual calls.
    """

    def __init__(self, size: int = 1) -> None:
        self._flags = torch.zeros(size, dtype=torch.int64)
        self._numbers = self._flags.numpy()
        self._options = dist.AllreduceOptions()
        self._options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        self._work: dist.Work | None = None

    def start(self, vector: Sequence[int]) -> None:
        """Contributes this rank's values. Every rank must call it at the same point."""
        self._numbers[:] = vector
        self._work = control_group().allreduce([self._flags], self._options)

    def wait(self) -> list[int] | None:
        """The elementwise maximum; None if it was not started. Blocks."""
        if self._work is None:
            return None
        self._work.wait()
        self._work = None
        return self._numbers.tolist()


def barrier() -> None:
    """Waits until every rank has called it."""
    all_reduce_max([0])


def broadcast(value: T, source: int = 0) -> T:
    """The value of rank `source` (any picklable object), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=control_group())
    return box[0]


def all_gather(value: T) -> list[T]:
    """Every rank's value (any picklable object), by rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


@contextmanager
def raise_on_all_ranks(doing: str) -> Iterator[None]:
    """Makes a failure on any rank a failure on all, so that none is left waiting.

    The body must contain no collective, except ones that fail on all ranks. If it raised anywhere,
    every rank raises the error of the first rank that failed: a HarnessError unchanged, any other
    error as one of its kind, with that rank's traceback. `doing`: what was being done, for the
    message.
    """
    failure: HarnessError | None = None
    try:
        with no_exit():
            yield
    except HarnessError as error:
        failure = error
    except OSError as error:
        failure = HarnessError(f"{doing}: {error}")
    except Exception as error:
        kind = {"task": TaskError, "oom": OutOfMemory}.get(kind_of(error), HarnessError)
        failure = kind(f"{doing}:\n{traceback.format_exc()}")
    if all_reduce_max([failure is not None]) == [0]:  # far cheaper than to gather
        return
    failures = all_gather(failure)
    for rank, failed in enumerate(failures):
        if failed is not None:
            error = failed if all(failures) else type(failed)(f"rank {rank}: {failed}")
            error.rank = None if all(failures) else rank
            error.on_all_ranks = True
            raise error
