"""Whether all ranks gave gradients to the same parameters, in the same order.

If not, ZeRO has added gradients of different parameters to each other (`zero.arrivals`): the
weights are wrong, and must not be saved.
"""

import hashlib
from array import array
from collections.abc import Iterable
from typing import Protocol

from harness import distributed
from harness.errors import GradientError
from harness.zero.arrivals import Arrivals, Record

KEPT_STEPS = 3
"""Steps whose records are kept: a difference is noticed a step or two later."""

DIGEST_BYTES = 6


class CheckedEngine(Protocol):
    """The part of an `engine.engine.Engine` that is used here."""

    name: str
    arrivals: Arrivals


class GradientCheck:
    """The records of the last steps on this rank, and their digests."""

    def __init__(self) -> None:
        self._records: dict[int, dict[str, Record]] = {}
        self._digests: dict[int, int] = {}

    def digest(self, step: int, engines: Iterable[CheckedEngine]) -> int:
        """48 bits of what arrived in a step that is over; where they differ between the ranks, the
        gradients are wrong. `engines`: those that were trained in it."""
        if step not in self._digests:
            records = {engine.name: engine.arrivals.take() for engine in engines}
            self._records[step], self._digests[step] = records, _digest(records.values())
            self._records.pop(step - KEPT_STEPS, None)
            self._digests.pop(step - KEPT_STEPS, None)
        return self._digests[step]

    def raise_difference(self, step: int, engines: Iterable[CheckedEngine]) -> None:
        """Raises a GradientError with the difference between the ranks in a step, on all of them.

        Collective; for a step whose digests differ.
        """
        per_rank = distributed.all_gather(self._records.get(step, {}))
        for engine in engines:
            records = [records.get(engine.name, Record()) for records in per_rank]
            if text := engine.arrivals.describe_difference(records):
                break
        else:
            return
        error = GradientError(
            f"engine {engine.name!r}: step {step}: {text}. Above ZeRO 0 this can add gradients of "
            "different parameters to each other, so the weights are not saved. Use the same "
            f'parameters on every rank, or set engines.{engine.name}.unused_parameters = "zeros", '
            "and resume from the last checkpoint"
        )
        error.on_all_ranks = True
        raise error


def _digest(records: Iterable[Record]) -> int:
    total = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for record in records:
        for numbers in (record.gradients, record.modules):
            total.update(array("q", [len(numbers)]).tobytes())
            total.update(array("q", numbers).tobytes())
    return int.from_bytes(total.digest())
