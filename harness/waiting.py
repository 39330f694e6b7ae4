"""How long this rank has waited for the others, inside of collectives.

Where a collective only enqueues work for a device, it is the device that waits, and how long is not
known here; that there was a collective is.
"""

from collections.abc import Callable
from functools import wraps
from time import perf_counter
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

seconds = 0.0
"""In collectives so far, in this process."""
collectives = 0
"""So far; those within one are a part of it."""
_depth = 0
_began = 0.0


class _InCollective:
    def __enter__(self) -> None:
        global _depth, _began
        if _depth == 0:
            _began = perf_counter()
        _depth += 1

    def __exit__(self, *error: object) -> None:
        global _depth, seconds, collectives
        _depth -= 1
        if _depth == 0:
            seconds += perf_counter() - _began
            collectives += 1


in_collective = _InCollective()
"""A context in which this rank waits for others."""


def waits(function: Callable[P, T]) -> Callable[P, T]:
    """The function, always called `in_collective`."""

    @wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> T:
        with in_collective:
            return function(*args, **kwargs)

    return counted
