"""The tree that small messages go along."""

import math
from collections.abc import Sequence

import pytest
import torch

from harness import distributed
from harness.distributed.tree import place_of
from harness.testing.pool import RankPool


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 64, 100])
@pytest.mark.parametrize("root", [0, 1])
def test_every_rank_is_below_the_root_once(size: int, root: int) -> None:
    """In at most log2(ranks) hops; and what each subtree has are neighbours, in their order."""
    ranks, root = range(size), root % size
    places = {rank: place_of(rank, ranks, root) for rank in ranks}
    hops = math.ceil(math.log2(size))

    def below(rank: int, depth: int) -> Sequence[int]:
        assert depth <= hops
        children = places[rank].children
        assert all(places[child].parent == rank for child in children)
        return [rank, *(found for child in children for found in below(child, depth + 1))]

    assert places[root].parent is None
    assert below(root, 0) == [(root + number) % size for number in range(size)]
    assert sum(not place.children for place in places.values()) == (size + 1) // 2
    assert max(len(place.children) for place in places.values()) == hops


def test_a_tree_may_have_some_of_the_ranks() -> None:
    ranks = (3, 4, 9)
    assert place_of(3, ranks, 3) == (None, (4, 9))
    assert place_of(9, ranks, 9) == (None, (3, 4))


def values() -> list[object]:
    """What the exchanges return on this rank."""
    rank = distributed.global_rank()
    some = (0, 2) if rank != 1 else (1,)
    total = torch.tensor([rank, 1])
    distributed.all_reduce_sum(total, some)
    return [
        distributed.gather(rank),
        distributed.reduce(str(rank), lambda one, other: one + other),
        distributed.all_reduce({rank}, lambda one, other: one | other),
        distributed.broadcast(rank, 2, (0, 2)),
        distributed.first_rank(rank > 0),
        distributed.first_rank(rank < 0),
        distributed.first_rank(rank >= 0),
        total.tolist(),
        distributed.broadcast(bytes(100_000 * rank), 1) == bytes(100_000),
    ]


def test_exchanges_of_objects(three_ranks: RankPool) -> None:
    agreed = [(1, False), (None, False), (0, True)]
    assert three_ranks.run(values) == [
        [[0, 1, 2], "012", {0, 1, 2}, 2, *agreed, [2, 2], True],
        [None, None, {0, 1, 2}, 1, *agreed, [1, 1], True],
        [None, None, {0, 1, 2}, 2, *agreed, [2, 2], True],
    ]


def in_progress() -> list[list[int] | None]:
    """Several all-reduces at once, and a blocking one in between."""
    rank = distributed.global_rank()
    some, more = distributed.AsyncAllReduceMax(), distributed.AsyncAllReduceMax()
    some.start([rank])
    more.start([-rank])
    between = distributed.all_reduce_max([10 * rank])
    return [more.wait(), between, some.wait(), some.wait()]


def test_exchanges_in_the_background_do_not_meet_others(three_ranks: RankPool) -> None:
    assert three_ranks.run(in_progress) == [[[0], [20], [2], None]] * 3
