"""Numbers that ranks note down for the others."""

from collections.abc import Sequence

import pytest

from harness import distributed
from harness.distributed.shared_numbers import SharedNumbers
from harness.testing.pool import RankPool


def noted(rounds: Sequence[int], is_one_node: bool) -> list[list[int] | None]:
    """What this rank reads, if rank r is in round `rounds[r]`; it has noted down r, 1 and 2."""
    rank = distributed.global_rank()
    numbers = SharedNumbers(capacity=3)
    if not is_one_node:
        numbers._by_rank = [v if r == rank else None for r, v in enumerate(numbers._by_rank)]
    numbers.add([5, 6])
    for _ in range(rounds[rank]):
        numbers.next_round()
    numbers.clear()
    numbers.add([rank])
    numbers.add([1, 2, 3])
    distributed.barrier()
    found = numbers.read(timeout_s=2.0)
    distributed.barrier()
    return [None if part is None else list(part) for part in found]


@pytest.mark.parametrize("is_one_node", [True, False])
def test_ranks_read_what_the_others_have_noted_down(two_ranks: RankPool, is_one_node: bool) -> None:
    assert two_ranks.run(noted, [2, 2], is_one_node) == [[[0, 1, 2], [1, 1, 2]]] * 2


def test_a_rank_in_another_round_is_unknown(two_ranks: RankPool) -> None:
    assert two_ranks.run(noted, [1, 2], True) == [[[0, 1, 2], None], [None, [1, 1, 2]]]


def ask_alone() -> list[bool]:
    numbers = SharedNumbers(capacity=1)
    rank = distributed.global_rank()
    numbers._by_rank = [v if r == rank else None for r, v in enumerate(numbers._by_rank)]
    found = numbers.read(timeout_s=0.2) if rank == 0 else [None, None]
    distributed.barrier()
    return [part is not None for part in found]


def test_ranks_of_a_node_that_does_not_answer_are_unknown(two_ranks: RankPool) -> None:
    assert two_ranks.run(ask_alone)[0] == [True, False]
