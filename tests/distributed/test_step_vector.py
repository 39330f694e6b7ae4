"""The vector that the ranks sum in each step."""

from collections.abc import Sequence

import pytest

from harness.distributed import StepVector
from harness.testing.pool import RankPool


class Part:
    """Contributes a number and its negative."""

    def __init__(self, number: float):
        self.number = number
        self.received: list[Sequence[float]] = []

    def contribute(self) -> Sequence[float]:
        self.number += 1
        return [self.number, -self.number]

    def receive(self, sums: Sequence[float]) -> None:
        self.received.append(list(sums))


def received() -> list[list[Sequence[float]]]:
    """What two parts have received after one exchange, after two, and after a drain."""
    vector, parts = StepVector(), [Part(0), Part(10)]
    for part in parts:
        vector.add(part)
    vector.wait()
    vector.exchange()
    assert not parts[0].received
    vector.exchange()
    vector.drain()
    vector.wait()
    return [part.received for part in parts]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_are_received_one_exchange_later(request: pytest.FixtureRequest, ranks: int) -> None:
    """A single rank has them without a collective."""
    first = [[n, -n] for n in (1 * ranks, 2 * ranks, 3 * ranks)]
    second = [[n, -n] for n in (11 * ranks, 12 * ranks, 13 * ranks)]
    if ranks == 1:
        assert received() == [first, second]
        return
    pool: RankPool = request.getfixturevalue("two_ranks")
    assert pool.run(received) == [[first, second]] * 2
