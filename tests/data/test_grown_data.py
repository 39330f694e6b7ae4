"""A position in data that has changed since: `fit_state_dict`."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from harness import distributed
from harness.data import BatchedOrderedSampler, OrderedSampler, PoolSampler, RandomSampler, Sampler
from harness.data.mixture import MixtureSampler
from harness.data.sampler import STORED
from harness.data.task_loader import TaskLoader
from harness.testing.pool import RankPool

Build = Callable[..., Sampler[Any]]
BEFORE, NOW = 23, 31
KINDS: dict[str, Build] = {"random": RandomSampler, "ordered": OrderedSampler, "pool": PoolSampler}


def position(build: Build, length: int, rounds: int, world_size: int) -> dict[str, Any]:
    sampler = build(length, seed=3, world_size=world_size)
    sampler.advance(rounds)
    return sampler.state_dict()


def resumed(build: Build, state: Any, length: int, world_size: int) -> list[Sampler[Any]]:
    ranks = [build(length, rank=rank, world_size=world_size) for rank in range(world_size)]
    texts = {sampler.fit_state_dict(state) for sampler in ranks}
    assert len(texts) == 1 and "begins again" not in texts.pop()
    return ranks


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_epoch_in_progress_ends_as_it_began(name: str, world_size: int) -> None:
    """Also after a save in it, and on another number of ranks."""
    build = KINDS[name]
    state = position(build, BEFORE, 6, 1)
    old = build(BEFORE, seed=3)
    old.load_state_dict(state)
    rest = list(islice(old.stream(), BEFORE - 6))
    ranks = resumed(build, state, NOW, world_size)
    for sampler in ranks:
        sampler.advance(2)
    ranks = resumed(build, ranks[0].state_dict(), NOW, 1)
    assert list(islice(ranks[0].stream(), BEFORE - 6 - 2 * world_size)) == rest[2 * world_size :]
    drawn = list(islice(ranks[0].stream(), BEFORE - 6 - 2 * world_size + 2 * NOW))
    assert Counter(drawn[BEFORE - 6 - 2 * world_size :]) == Counter([*range(NOW)] * 2)
    ranks[0].advance(BEFORE)
    assert ranks[0].epoch == 1 and "grown" not in ranks[0].state_dict()


def test_data_may_grow_again_and_again() -> None:
    state = position(RandomSampler, 10, 4, 1)
    for length in (12, 15):
        (sampler,) = resumed(RandomSampler, state, length, 1)
        state = sampler.state_dict()
    drawn = list(islice(sampler.stream(), 6 + 15))
    assert sorted(drawn[6:]) == [*range(15)] and len({*drawn[:6]}) == 6 and max(drawn[:6]) < 10


def test_a_stored_order_is_followed_by_a_computed_one() -> None:
    state = position(RandomSampler, 5, 2, 1)
    (sampler,) = resumed(RandomSampler, state, STORED + 1, 1)
    assert len({*islice(sampler.stream(), 3)}) == 3 and max(islice(sampler.stream(), 3)) < 5
    drawn = Counter(islice(sampler.stream(), 3 + STORED + 1))
    assert len(drawn) == STORED + 1
    (again,) = resumed(RandomSampler, sampler.state_dict(), STORED + 1, 1)
    assert list(islice(again.stream(), 20)) == list(islice(sampler.stream(), 20))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: RandomSampler(20), "length is 23 in the state, but 20 in the sampler"),
        (lambda: OrderedSampler(31), "sampler is 'RandomSampler' in the state"),
        (lambda: BatchedOrderedSampler([1] * 31, max_batch_size=4), "sampler is 'RandomSampler'"),
    ],
)
def test_else_the_epoch_begins_again(build: Any, reason: str) -> None:
    sampler = build()
    text = sampler.fit_state_dict(position(RandomSampler, BEFORE, BEFORE + 6, 1))
    assert reason in text and text.startswith("epoch 1 begins again")
    assert sampler.place == (1, 0)


def test_batches_of_other_lengths_begin_again() -> None:
    old = BatchedOrderedSampler([1, 2, 3, 4] * 4, max_batch_size=4, shuffle=True)
    old.advance(2)
    new = BatchedOrderedSampler([1, 2, 3, 4] * 5, max_batch_size=4, shuffle=True)
    assert "begins again" in new.fit_state_dict(old.state_dict())
    draws = islice(new.stream(), new.draws(0))
    assert sorted(index for draw in draws for index in draw) == [*range(20)]


def test_sources_of_a_mixture_come_grow_and_go() -> None:
    before = MixtureSampler({"a": 4, "b": 3, "c": 5}, {"a": 1, "b": 1, "c": 1})
    before.advance(20)
    taken = before.state_dict()["taken"]
    after = MixtureSampler({"a": 6, "b": 3, "d": 2}, {"a": 1, "b": 1, "d": 1})
    text = after.fit_state_dict(before.state_dict())
    assert "source 'a' has 6 samples, and had 4: its epoch" in text
    assert "'d' is new" in text and "'c' is gone" in text and "'b'" not in text
    assert after.passes() == {"a": taken["a"] // 4, "b": taken["b"] / 3, "d": 0}
    assert len({i for i in islice(after.stream(), 60) if i < 6}) == 6


def position_in(batches: list[Any], state: Any = None) -> tuple[Any, str, list[Any]]:
    """Of a task's own loader on this rank: its state after 2 batches, what becomes of it if it is
    loaded from `state`, and the next batches."""
    loader, text = TaskLoader(batches, distributed.world_size(), 0), ""
    if state is not None:
        text = loader.fit_state_dict(state)
    given = [next(loader), next(loader)]
    return loader.state_dict(), text, given


def test_a_loader_that_begins_with_another_batch_begins_again(two_ranks: RankPool) -> None:
    """Of a task, without a state: its position is a number of batches. On all ranks, if on one."""
    ((state, _, _), _) = two_ranks.run(position_in, [[1], [2], [3]])
    grown = two_ranks.run(position_in, [[1], [2], [3], [4]], state)
    assert [(text, given) for _, text, given in grown] == [("", [[3], [4]])] * 2
    for _, text, given in two_ranks.run(position_on_ranks, state):
        assert "epoch 0 begins again" in text and given[1] == [1]


def position_on_ranks(state: Any) -> tuple[Any, str, list[Any]]:
    return position_in([[1] if distributed.global_rank() else [9], [1], [2], [3]], state)
