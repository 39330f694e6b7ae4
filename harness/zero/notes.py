"""What a rank notes down of a micro-batch, in case that a collective in it fails.

A collective fails if its sizes differ between the ranks, which ends some of them at once.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from harness.distributed.shared_numbers import SharedNumbers
from harness.zero import fetches
from harness.zero.buckets import Buckets

SECONDS_TO_ANSWER = 5.0
"""How long the ranks of other nodes have to answer."""

ByRank: TypeAlias = dict[int, Sequence[int]]


class Notes:
    """The gradients that were reduced in the last backward, and the modules that ZeRO 3 fetched."""

    def __init__(self, ds: Any, buckets: Buckets | None):
        """Collective."""
        self._gradients = None
        if buckets is not None and buckets.by_arrival:
            self._gradients = SharedNumbers(len(buckets.parameters))
        self._modules = SharedNumbers(8 * modules) if (modules := len(fetches.names(ds))) else None
        if self._modules is not None:
            fetches.note_calls(ds, self._modules)

    def begin_backward(self) -> None:
        """The gradients of another micro-batch follow."""
        if self._gradients is not None:
            self._gradients.next_round()
            self._gradients.clear()

    def add_gradients(self, numbers: Sequence[int]) -> None:
        """Gradients are about to be reduced."""
        if self._gradients is not None:
            self._gradients.add(numbers)

    def modules(self) -> ByRank:
        """As far as all known ranks have come, in order. Blocks for the ranks of other nodes."""
        return _common(self._modules)

    def gradients(self) -> ByRank:
        """Like `modules`."""
        return _common(self._gradients)


def _common(numbers: SharedNumbers | None) -> ByRank:
    if numbers is None:
        return {}
    per_rank = enumerate(numbers.read(SECONDS_TO_ANSWER))
    known = {rank: found for rank, found in per_rank if found is not None}
    length = min(map(len, known.values()))
    return {rank: found[:length] for rank, found in known.items()}
