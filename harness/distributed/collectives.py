"""Small collectives on the control group: all-reduce, broadcast, gather, raising together."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import add
from typing import TypeVar, cast

import torch
from torch import Tensor

from harness.distributed import tree
from harness.distributed.background import AllReduce
from harness.distributed.forks import sockets_close_in_forks
from harness.distributed.world import global_rank, next_tag, world_size
from harness.errors import HarnessError, OutOfMemory, TaskError, kind_of, no_exit
from harness.waiting import in_collective

T = TypeVar("T")
Ranks = range | tuple[int, ...]


def _maximum(one: Tensor, other: Tensor) -> None:
    torch.maximum(one, other, out=one)


def all_reduce_max(vector: Sequence[int]) -> list[int]:
    """The elementwise maximum over all ranks. Blocks until every rank has called."""
    flags = torch.tensor(vector, dtype=torch.int64)
    with _exchange() as (place, tag):
        tree.all_reduce(flags, _maximum, place, tag)
    return flags.tolist()


def all_reduce_sum(vector: Tensor, ranks: Ranks | None = None) -> None:
    """Overwrites the vector by its sum over all ranks; or over those of `ranks`, of which this rank
    is one, while the others have other `ranks`. Blocks until every rank has called."""
    ranks = ranks or range(world_size())
    with _exchange(ranks, ranks[0]) as (place, tag):
        tree.all_reduce(vector, Tensor.add_, place, tag)


class AsyncAllReduceMax:
    """`all_reduce_max` in the background: `start` it, and `wait` for the result later."""

    def __init__(self) -> None:
        self._exchange = AllReduce(_maximum)

    def start(self, vector: Sequence[int]) -> None:
        """Contributes this rank's values. Every rank must call it at the same point."""
        self._exchange.start(torch.tensor(vector, dtype=torch.int64))

    def wait(self) -> list[int] | None:
        """The elementwise maximum; None if it was not started. Blocks."""
        found = self._exchange.wait()
        return None if found is None else found.tolist()


def barrier() -> None:
    """Waits until every rank has called it."""
    all_reduce_max([0])


def broadcast(value: T, source: int = 0, ranks: Ranks | None = None) -> T:
    """The value of rank `source` (any picklable object), on every rank; or on those of `ranks`, of
    which the source is one, and on the others their own. Every rank calls it."""
    with _exchange(ranks, source) as (place, tag):
        return tree.broadcast(value, place, tag)


def reduce(value: T, combine: Callable[[T, T], T]) -> T | None:
    """The values of all ranks (any picklable objects), combined in the order of the ranks on their
    way to rank 0, which has the result; None on the others."""
    with _exchange() as (place, tag):
        return tree.reduce(value, combine, place, tag)


def all_reduce(value: T, combine: Callable[[T, T], T]) -> T:
    """`reduce`, with the result on every rank: small, however many ranks there are."""
    return cast(T, broadcast(reduce(value, combine)))


def gather(value: T) -> list[T] | None:
    """Every rank's value (any picklable object), by rank, on rank 0; None on the others."""
    return reduce([value], add)


def all_gather(value: T) -> list[T]:
    """Every rank's value (any picklable object), by rank, on every rank.

    What each receives grows with the number of ranks: for the start of a run and for failures.
    """
    return all_reduce([value], add)


def first_rank(condition: bool) -> tuple[int | None, bool]:
    """The first rank where a condition holds, None if on no rank; and whether on all."""
    ranks = world_size()
    found, fails = all_reduce_max([condition * (ranks - global_rank()), not condition])
    return (ranks - found if found else None), not fails


@contextmanager
def _exchange(ranks: Ranks | None = None, root: int = 0) -> Iterator[tuple[tree.Place, int]]:
    """This rank's place and tag in an exchange among `ranks`, by default all."""
    tag = next_tag()
    if ranks is None and root == 0:  # connected since `init`
        with in_collective:
            yield tree.place_of(global_rank(), range(world_size()), 0), tag
    elif global_rank() in (ranks := ranks or range(world_size())):
        with in_collective, sockets_close_in_forks():
            yield tree.place_of(global_rank(), ranks, root), tag
    else:
        yield tree.Place(None, ()), tag


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
    rank, on_all = first_rank(failure is not None)
    if rank is None:
        return
    failed = broadcast(failure, rank)
    assert failed is not None
    error = failed if on_all else type(failed)(f"rank {rank}: {failed}")
    error.rank = None if on_all else rank
    error.on_all_ranks = True
    raise error
