"""Numbers of each rank in a vector of sums, with ranks that are all in this process."""

import pytest

from harness.distributed import rank_numbers
from harness.distributed.rank_numbers import SLOTS, RankNumbers


class World:
    """Ranks that exchange their numbers."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(rank_numbers, "world_size", lambda: size)
        self.ranks: list[RankNumbers] = []
        for rank in range(size):
            monkeypatch.setattr(rank_numbers, "global_rank", lambda rank=rank: rank)
            self.ranks.append(RankNumbers())

    def step(self, *numbers: list[float]) -> list[list[float]]:
        """What rank 0 hears after a step; the others hear nothing."""
        told = [rank.tell(own) for rank, own in zip(self.ranks, numbers, strict=True)]
        sums = [sum(column) for column in zip(*told, strict=True)]
        heard = [rank.hear(sums) for rank in self.ranks]
        assert not any(heard[1:])
        return [list(of_rank) for of_rank in heard[0]]


def test_in_every_step_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(3, monkeypatch)
    for step in range(3):
        numbers = [[rank + step, 10.0 * rank] for rank in range(3)]
        assert world.step(*numbers) == numbers


def test_many_ranks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vector does not grow with the world; what a rank tells covers the steps since its last
    turn."""
    size = 2 * SLOTS + 5
    world = World(size, monkeypatch)
    assert len(RankNumbers().tell([1.0, 2.0])) == 2 * SLOTS
    for step in range(1, 10):
        heard = world.step(*([float(rank), float(step)] for rank in range(size)))
        if step % 3:
            assert heard == []
            continue
        assert [rank for rank, _ in heard] == list(range(size))
        steps = {turn: heard[turn * SLOTS][1] for turn in range(3)}
        if step > 3:
            assert steps == {0: step - 3, 1: step - 2, 2: step - 1}


def test_alone_in_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, monkeypatch)
    assert world.step([1.0]) == []
