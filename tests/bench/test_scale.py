"""The model of the small messages against real ranks, and what it says of ten thousand."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.scale import Network, connections_of, tree_s
from harness.distributed.tree import place_of


@pytest.mark.parametrize("ranks", [6, pytest.param(64, marks=pytest.mark.slow)])
def test_connections_and_messages_of_real_ranks_are_those_of_the_model(ranks: int) -> None:
    command = [sys.executable, "-m", "bench.scale", "--check", str(ranks)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=300)


def test_ten_thousand_ranks() -> None:
    """50 us a hop, and 25 us of CPU to send a message, or to receive it."""
    ranks = 10_000
    assert tree_s(ranks, Network(50e-6, 25e-6)) < 5e-3
    found = [connections_of(rank, ranks) for rank in range(ranks)]
    for rank, connections in enumerate(found):
        parent, children = place_of(rank, range(ranks), 0)
        assert connections == (parent is not None) + len(children)
    assert max(found) == 14 and sum(found) == 2 * (ranks - 1)


def test_the_time_of_an_agreement_in_hops() -> None:
    """Up and down a tree of 8 ranks: 3 hops each way, if sending takes no time."""
    assert tree_s(8, Network(1, 0)) == 6
    assert tree_s(2, Network(10, 1)) == 24
    assert tree_s(2, Network(0, 1, cores=1)) == 4
