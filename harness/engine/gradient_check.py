"""Whether all ranks gave gradients to the same parameters, in the same order.

If not, ZeRO has added gradients of different parameters to each other (`zero.arrivals`): the
weights are wrong, and must not be saved.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from harness import distributed
from harness.errors import GradientError
from harness.zero.arrivals import Arrivals, Record

DIGEST_BYTES = 6


class CheckedEngine(Protocol):
    """The part of an `engine.engine.Engine` that is used here."""

    name: str
    arrivals: Arrivals


class _Step(NamedTuple):
    """What this rank did in a step."""

    number: int
    engines: list[CheckedEngine]
    records: list[Record]
    """By engine."""


class GradientCheck:
    """Compares what arrived on the ranks in each step; a part of the step's vector.

    Each rank contributes numbers and their squares, whose sums show whether all have the same.
    """

    def __init__(self) -> None:
        self._recorded: _Step | None = None
        """The last step, until it is contributed."""
        self._summing: _Step | None = None
        """The one that the vector is being summed for."""

    def record(self, step: int, engines: Sequence[CheckedEngine]) -> None:
        """Records a step that is over. `engines`: those that were trained in it."""
        records = [engine.arrivals.take() for engine in engines]
        self._recorded = _Step(step, list(engines), records)

    def contribute(self) -> Sequence[float]:
        """The last step's digest in 16-bit numbers, and their squares."""
        self._summing, self._recorded = self._recorded, None
        if self._summing is None:
            return ()
        digest = _digest(self._summing.records)
        words = [digest >> shift & 0xFFFF for shift in range(0, 8 * DIGEST_BYTES, 16)]
        return [*words, *(word * word for word in words)]

    def receive(self, sums: Sequence[float]) -> None:
        """Raises a GradientError, on all ranks, if their digests differ."""
        numbers, world_size = list(map(int, sums)), distributed.world_size()
        half = len(numbers) // 2
        pairs = zip(numbers[:half], numbers[half:], strict=True)
        if any(world_size * of_squares != total * total for total, of_squares in pairs):
            self._raise_difference()

    def _raise_difference(self) -> None:
        assert self._summing is not None
        step, engines, records = self._summing
        per_rank = distributed.all_gather(records)
        name, text = engines[0].name, "the ranks' gradients arrived in different orders"
        for engine, of_ranks in zip(engines, zip(*per_rank, strict=True), strict=True):
            if difference := engine.arrivals.describe_difference(of_ranks):
                name, text = engine.name, difference
                break
        error = _error(name, step, text)
        error.on_all_ranks = True
        raise error


def explain_failure(step: int, engines: Sequence[CheckedEngine]) -> GradientError | None:
    """Why a collective has failed in a step, if the ranks differ. Blocks for those of other nodes.

    The others may have ended: some collectives of unequal sizes end a process at once.
    """
    for engine in engines:
        if text := engine.arrivals.describe_failure():
            return _error(engine.name, step, f"a collective has failed, as {text}")
    return None


def _error(name: str, step: int, text: str) -> GradientError:
    return GradientError(
        f"engine {name!r}: step {step}: {text}. Above ZeRO 0 this can add gradients of "
        "different parameters to each other, so the weights are not saved. Use the same "
        f'parameters on every rank, or set engines.{name}.unused_parameters = "zeros", '
        "and resume from the last checkpoint"
    )


def _digest(records: Sequence[Record]) -> int:
    total = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for record in records:
        for numbers in (record.gradients, record.modules):
            total.update(len(numbers).to_bytes(8))
            total.update(numbers)
    return int.from_bytes(total.digest())
