"""Laws of the samplers: once an epoch, the same on any number of ranks, resumable anywhere."""

import hashlib
import importlib
import io
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from harness.data import (
    BatchedOrderedSampler,
    OrderedSampler,
    PoolSampler,
    RandomSampler,
    Sampler,
)
from harness.data.sampler import STORED

Build = Callable[..., Sampler[Any]]


def lengths_of(count: int) -> list[int]:
    """Lengths from 1 to 13, neither sorted nor all alike."""
    return [1 + (7 * index * index) % 13 for index in range(count)]


def batched(count: int, **options: Any) -> Sampler[Any]:
    defaults: dict[str, Any] = {"max_tokens": 30, "buckets": 3}
    return BatchedOrderedSampler(lengths_of(count), **defaults | options)


BUILDS: dict[str, Build] = {
    "ordered": OrderedSampler,
    "random": RandomSampler,
    "pool": PoolSampler,
    "pool in order": lambda count, **ranks: PoolSampler(count, shuffle=False, **ranks),
    "pool of items": lambda count, **ranks: PoolSampler(range(count), keep_all=True, **ranks),
    "batched": batched,
    "batched, shuffled": lambda count, **ranks: batched(count, shuffle=True, **ranks),
    "batched, summed": lambda count, **ranks: batched(count, padded=False, shuffle=True, **ranks),
}

builds = st.sampled_from(sorted(BUILDS)).map(BUILDS.__getitem__)
counts = st.integers(1, 40)
world_sizes = st.integers(1, 7)
seeds = st.integers(0, 2**64)
laws = settings(deadline=None, max_examples=60)


def interleaved(ranks: list[Sampler[Any]]) -> Iterator[Any]:
    """The complete stream: the draws of all ranks, round by round."""
    for round_ in zip(*[sampler.stream() for sampler in ranks], strict=True):
        yield from round_


def on_all_ranks(build: Build, count: int, world_size: int, seed: int) -> list[Sampler[Any]]:
    return [build(count, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def indices_of(draw: int | list[int]) -> list[int]:
    return draw if isinstance(draw, list) else [draw]


# The stream


@laws
@given(builds, counts, world_sizes, seeds)
def test_every_epoch_of_the_stream_holds_each_index_once(
    build: Build, count: int, world_size: int, seed: int
) -> None:
    stream = interleaved(on_all_ranks(build, count, world_size, seed))
    for _ in range(3):
        drawn: list[int] = []
        while len(drawn) < count:
            drawn += indices_of(next(stream))
        assert sorted(drawn) == list(range(count))


@laws
@given(builds, counts, world_sizes, seeds)
def test_the_stream_is_the_same_for_any_world_size(
    build: Build, count: int, world_size: int, seed: int
) -> None:
    alone = build(count, seed=seed)
    together = interleaved(on_all_ranks(build, count, world_size, seed))
    places = 3 * count
    assert list(islice(together, places)) == list(islice(alone.stream(), places))


@laws
@given(builds, counts, world_sizes, seeds, st.integers(0, 30))
def test_iterating_gives_the_rounds_that_begin_in_the_epoch(
    build: Build, count: int, world_size: int, seed: int, rounds: int
) -> None:
    ranks = on_all_ranks(build, count, world_size, seed)
    for sampler in ranks:
        sampler.advance(rounds)
    epoch, position, total = ranks[0].epoch, ranks[0].position, ranks[0].draws(ranks[0].epoch)
    drawn = [list(sampler) for sampler in ranks]

    assert {len(draws) for draws in drawn} == {len(ranks[0])}
    in_rounds = [draw for round_ in zip(*drawn, strict=True) for draw in round_]
    assert in_rounds == list(islice(interleaved(ranks), len(in_rounds)))
    assert len(in_rounds) - world_size < total - position <= len(in_rounds)

    assert all((s.epoch, s.position) == (epoch, position) for s in ranks), "iterating advanced it"
    ranks[0].advance(len(ranks[0]) - 1)
    assert ranks[0].epoch == epoch
    ranks[0].advance()
    assert ranks[0].epoch > epoch


@laws
@given(builds, counts, world_sizes, st.integers(0, 100))
def test_advancing_many_rounds_equals_advancing_one_by_one(
    build: Build, count: int, world_size: int, rounds: int
) -> None:
    together, singly = build(count, world_size=world_size), build(count, world_size=world_size)
    together.advance(rounds)
    for _ in range(rounds):
        singly.advance()
    assert together.state_dict() == singly.state_dict()


def test_a_round_is_completed_from_the_next_epoch_which_continues_after_it() -> None:
    ranks = on_all_ranks(OrderedSampler, 5, world_size=3, seed=0)
    assert [list(sampler) for sampler in ranks] == [[0, 3], [1, 4], [2, 0]]
    for sampler in ranks:
        sampler.advance(len(sampler))
        assert (sampler.epoch, sampler.position) == (1, 1)
    assert [list(sampler) for sampler in ranks] == [[1, 4], [2, 0], [3, 1]]


def test_one_round_may_span_many_epochs() -> None:
    sampler = OrderedSampler(2, rank=6, world_size=7)
    assert list(islice(sampler.stream(), 3)) == [6 % 2, 13 % 2, 20 % 2]
    sampler.advance()
    assert (sampler.epoch, sampler.position) == (3, 1)


def test_a_stream_starts_at_the_position_of_its_call() -> None:
    sampler = OrderedSampler(10)
    stream = sampler.stream()
    sampler.advance(3)
    assert next(stream) == 0
    assert next(sampler.stream()) == 3


@pytest.mark.parametrize("name", BUILDS)
def test_an_epoch_is_ordered_once_even_while_the_stream_is_ahead(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = BUILDS[name](60)
    made: list[int] = []
    order = sampler.order
    monkeypatch.setattr(sampler, "order", lambda epoch: made.append(epoch) or order(epoch))
    stream = sampler.stream()
    ahead = len(sampler) // 2
    for place, _ in enumerate(islice(stream, 4 * len(sampler))):
        if place >= ahead:
            sampler.advance()
    assert sampler.epoch >= 3
    assert made == sorted(set(made))


# Resuming


@laws
@given(builds, counts, world_sizes, seeds, st.integers(0, 60), st.data())
def test_a_resumed_stream_equals_the_uninterrupted_one(
    build: Build, count: int, world_size: int, seed: int, rounds: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    uninterrupted = build(count, seed=seed, rank=rank, world_size=world_size).stream()
    stopped = build(count, seed=seed, rank=rank, world_size=world_size)
    stopped.advance(rounds)
    # Another seed and position, which the state must replace.
    resumed = build(count, seed=seed + 1, rank=rank, world_size=world_size)
    next(resumed.stream())
    resumed.advance(3)
    resumed.load_state_dict(saved_and_loaded(stopped.state_dict()))

    expected = list(islice(uninterrupted, rounds, rounds + 50))
    assert list(islice(resumed.stream(), 50)) == expected
    assert resumed.state_dict() == stopped.state_dict()
    resumed.advance(50)
    stopped.advance(50)
    assert resumed.state_dict() == stopped.state_dict()


@laws
@given(builds, counts, seeds, st.lists(st.tuples(world_sizes, st.integers(0, 12)), max_size=5))
def test_runs_at_changing_world_sizes_make_one_stream(
    build: Build, count: int, seed: int, runs: list[tuple[int, int]]
) -> None:
    drawn: list[Any] = []
    state = build(count, seed=seed).state_dict()
    for world_size, rounds in runs:
        ranks = on_all_ranks(build, count, world_size, seed)
        for sampler in ranks:
            sampler.load_state_dict(saved_and_loaded(state))
        drawn += islice(interleaved(ranks), rounds * world_size)
        for sampler in ranks:
            sampler.advance(rounds)
        state = ranks[0].state_dict()
        assert all(sampler.state_dict() == state for sampler in ranks)
    assert drawn == list(islice(build(count, seed=seed).stream(), len(drawn)))


@pytest.mark.parametrize(
    ("saved", "loading", "names"),
    [
        (OrderedSampler(5), RandomSampler(5), ["sampler", "'OrderedSampler'", "'RandomSampler'"]),
        (RandomSampler(5), RandomSampler(6), ["length", "5", "6"]),
        (PoolSampler(5), PoolSampler(5, shuffle=False), ["shuffle", "True", "False"]),
        (batched(9), batched(9, max_tokens=31), ["max_tokens", "30", "31"]),
        (batched(9), batched(9, max_batch_size=4), ["max_batch_size", "inf", "4"]),
        (batched(9), batched(9, padded=False), ["padded", "True", "False"]),
        (batched(9), batched(9, buckets=2), ["buckets", "3", "2"]),
        (batched(9), batched(9, shuffle=True), ["shuffle", "False", "True"]),
        (batched(9), batched(9, drop_last=True), ["drop_last", "False", "True"]),
        (
            BatchedOrderedSampler([1, 2], max_tokens=9),
            BatchedOrderedSampler([2, 1], max_tokens=9),
            ["lengths_crc32"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_state_that_does_not_match_is_rejected_and_changes_nothing(
    saved: Sampler[Any], loading: Sampler[Any], names: list[str]
) -> None:
    saved.advance(2)
    before = loading.state_dict()
    with pytest.raises(ValueError, match=".*".join(names)):
        loading.load_state_dict(saved.state_dict())
    assert loading.state_dict() == before


@pytest.mark.parametrize("name", BUILDS)
def test_a_sampler_can_be_pickled_in_mid_epoch(name: str) -> None:
    sampler = BUILDS[name](30, seed=3)
    stream = sampler.stream()
    drawn = [next(stream) for _ in range(2)]
    sampler.advance(2)
    copy = pickle.loads(pickle.dumps(sampler))
    assert [next(copy.stream()), *drawn] == [next(stream), *drawn]


# Loading


class Itself:
    """A dataset whose items are their indices."""

    def __getitem__(self, index: int) -> int:
        return index


class Counted:
    """Passes an iterator on and counts what has been taken from it."""

    def __init__(self, draws: Iterator[Any]) -> None:
        self.draws = draws
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        for draw in self.draws:
            self.taken += 1
            yield draw


@pytest.mark.parametrize("name", ["random", "batched, shuffled"])
def test_workers_prefetch_but_only_what_is_consumed_counts(name: str) -> None:
    """Two workers, three samples a step, stopped in the second epoch, resumed without a gap."""
    in_lists = name.startswith("batched")
    per_step = 1 if in_lists else 3
    place = {"seed": 5, "rank": 1, "world_size": 2}

    def loaded(draws: Any) -> DataLoader[Any]:
        how = {"batch_sampler": draws} if in_lists else {"sampler": draws, "batch_size": per_step}
        return DataLoader(Itself(), num_workers=2, **how)  # type: ignore[arg-type]

    def steps(sampler: Sampler[Any], count: int) -> list[list[int]]:
        draws = Counted(sampler.stream())
        seen = []
        for batch in islice(loaded(draws), count):
            seen.append(batch.tolist())
            sampler.advance(per_step)
        assert draws.taken > count * per_step
        return seen

    sampler = BUILDS[name](25, **place)
    uninterrupted = BUILDS[name](25, **place)
    first = steps(sampler, 7)
    assert sampler.epoch >= 1
    uninterrupted.advance(7 * per_step)
    assert sampler.state_dict() == uninterrupted.state_dict()

    resumed = BUILDS[name](25, **place)
    resumed.load_state_dict(saved_and_loaded(sampler.state_dict()))
    stream = BUILDS[name](25, **place).stream()
    flat = [index for batch in first + steps(resumed, 4) for index in batch]
    expected = [index for draw in islice(stream, 11 * per_step) for index in indices_of(draw)]
    assert flat == expected


# The orders


def test_ordered_is_in_order() -> None:
    assert list(islice(OrderedSampler(3).stream(), 7)) == [0, 1, 2, 0, 1, 2, 0]


def test_permutations_differ_by_epoch_and_by_seed() -> None:
    orders = [tuple(RandomSampler(50, seed=s).order(e)) for s in range(10) for e in range(10)]
    assert len(set(orders)) == 100


def test_permutations_are_uniform() -> None:
    """Over 3000 epochs each of 5 items comes first about 600 times (sigma is 22)."""
    sampler = RandomSampler(5, seed=2)
    first = Counter(sampler.order(epoch)[0] for epoch in range(3000))
    assert set(first) == set(range(5))
    assert all(abs(times - 600) < 100 for times in first.values())


def test_a_stored_order_takes_about_eight_bytes_an_index() -> None:
    assert sys.getsizeof(RandomSampler(STORED).order(0)) < 9 * STORED


@pytest.mark.parametrize("count", [STORED + 1, 10**10])
def test_a_longer_order_takes_no_memory(count: int) -> None:
    for sampler in (RandomSampler(count), PoolSampler(count), PoolSampler(count, keep_all=True)):
        sampler.advance(count // 2)
        drawn = list(islice(sampler.stream(), 3000))
        assert len(set(drawn)) == 3000
        assert 0 <= min(drawn) < max(drawn) < count
        assert len(pickle.dumps(sampler)) < 1000


def test_a_state_of_before_continues_in_its_order() -> None:
    """Orders of any length were stored: torch's randperm, seeded by a digest."""
    count = STORED + 7
    digest = hashlib.blake2b(b"5/0", digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    order = torch.randperm(count, generator=generator).tolist()
    sampler = RandomSampler(count, seed=1)
    before = {"sampler": "RandomSampler", "length": count, "seed": 5, "epoch": 0, "position": 9}
    sampler.load_state_dict(before)
    assert list(islice(sampler.stream(), 2000)) == order[9:2009]
    assert sampler.state_dict() == before, "its later checkpoints stay in that order too"
    other = RandomSampler(count, seed=5)
    assert list(islice(other.stream(), 20)) != order[:20]
    assert other.state_dict()["order"] == "computed"


def test_an_order_is_freed_when_its_epoch_ends() -> None:
    sampler = RandomSampler(10_000)
    prefetched = list(islice(sampler.stream(), 10_001))
    sampler.advance(len(prefetched))
    assert sampler.epoch == 1
    assert 80_000 < len(pickle.dumps(sampler)) < 100_000, "one order is 80,000 bytes"


def test_draws_are_plain_ints() -> None:
    assert {type(draw) for draw in RandomSampler(5)} == {int}
    assert {type(i) for batch in batched(20, shuffle=True) for i in batch} == {int}


# The pool


def test_a_pool_is_emptied_before_it_is_refilled() -> None:
    pool = PoolSampler("abcde", keep_all=True, seed=4)
    first, second = [[pool.sample() for _ in range(5)] for _ in range(2)]
    assert sorted(first) == sorted(second) == list("abcde")
    assert first != second
    assert (pool.epoch, pool.position) == (2, 0)


def test_a_pool_gives_indices_or_items() -> None:
    pool = [30, 10, 20]
    indices = PoolSampler(pool, seed=1)
    items = PoolSampler(pool, keep_all=True, seed=1)
    assert sorted(indices) == [0, 1, 2]
    assert [pool[index] for index in indices] == list(items)


def test_an_unshuffled_pool_keeps_its_order() -> None:
    assert list(PoolSampler([30, 10, 20], keep_all=True, shuffle=False)) == [30, 10, 20]
    assert list(PoolSampler(3, shuffle=False)) == [0, 1, 2]


def test_ranks_sample_from_one_pool() -> None:
    pools = [PoolSampler(6, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(pool.sample() for _ in range(2) for pool in pools) == list(range(6))


# Batches

item_lengths = st.lists(st.integers(1, 20) | st.floats(0.5, 20), min_size=1, max_size=60)
limits = st.fixed_dictionaries(
    {},
    optional={"max_tokens": st.floats(20, 100), "max_batch_size": st.integers(1, 9)},
).filter(bool)


def tokens(batch: list[int], lengths: list[float], padded: bool) -> float:
    of = [lengths[index] for index in batch]
    return len(of) * max(of) if padded else sum(of)


@laws
@given(item_lengths, limits, st.booleans(), st.integers(1, 9), st.booleans(), seeds)
@example([*range(1, 21)] * 3, {"max_tokens": 50}, True, 1, True, 0)
@example([*range(1, 21)] * 3, {"max_tokens": 50}, False, 1, True, 0)
def test_batches_are_as_large_as_both_limits_allow(
    lengths: list[float],
    limit: dict[str, Any],
    padded: bool,
    buckets: int,
    shuffle: bool,
    seed: int,
) -> None:
    sampler = BatchedOrderedSampler(
        lengths, padded=padded, buckets=buckets, shuffle=shuffle, seed=seed, **limit
    )
    max_tokens = limit.get("max_tokens", float("inf"))
    max_batch_size = limit.get("max_batch_size", len(lengths))
    for epoch in range(2):
        batches = sampler.order(epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            assert 0 < len(batch) <= max_batch_size
            assert tokens(batch, lengths, padded) <= max_tokens
        if not shuffle and buckets == 1:
            for batch, following in pairwise(batches):
                more = [*batch, following[0]]
                full = len(batch) == max_batch_size
                assert full or tokens(more, lengths, padded) > max_tokens


@laws
@given(item_lengths, st.integers(1, 9), st.booleans(), seeds)
def test_a_batch_holds_items_of_one_bucket(
    lengths: list[float], buckets: int, shuffle: bool, seed: int
) -> None:
    sampler = BatchedOrderedSampler(
        lengths, max_batch_size=5, buckets=buckets, shuffle=shuffle, seed=seed
    )
    by_length = torch.tensor(sorted(range(len(lengths)), key=lengths.__getitem__))
    allowed = [set(part.tolist()) for part in by_length.tensor_split(buckets)]
    for batch in sampler:
        assert any(part.issuperset(batch) for part in allowed)


def test_shuffling_changes_the_batches_every_epoch() -> None:
    sampler = batched(60, shuffle=True, seed=1)
    first, second = list(sampler.order(0)), list(sampler.order(1))
    assert first == list(batched(60, shuffle=True, seed=1).order(0))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_shuffling_changes_the_order_of_the_batches_every_epoch() -> None:
    one_a_bucket = BatchedOrderedSampler(range(60), max_batch_size=4, buckets=15, shuffle=True)
    first, second = ([min(batch) for batch in one_a_bucket.order(epoch)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(0, 60, 4))
    assert first != sorted(first)
    assert first != second


def test_unshuffled_batches_are_the_same_every_epoch_and_go_from_short_to_long() -> None:
    sampler = BatchedOrderedSampler([3, 1, 2, 1, 9], max_tokens=9, buckets=1)
    assert list(sampler.order(0)) == list(sampler.order(1)) == [[1, 3, 2], [0], [4]]


@laws
@given(st.integers(5, 60), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_drop_last_leaves_only_batches_of_the_full_size(
    count: int, size: int, buckets: int, shuffle: bool
) -> None:
    parts = [len(part) for part in torch.arange(count).tensor_split(buckets)]
    expected = sum(part // size for part in parts)
    options: dict[str, Any] = {"max_tokens": None, "max_batch_size": size, "buckets": buckets}
    if not expected:
        with pytest.raises(ValueError, match=f"drop_last drops all batches of the {count} items"):
            batched(count, drop_last=True, shuffle=shuffle, **options)
        return
    sampler = batched(count, drop_last=True, shuffle=shuffle, **options)
    assert [len(batch) for batch in sampler] == [size] * expected


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([5, 5, 5, 5], [[0, 1], [2, 3]]),  # the last is exactly full
        ([4, 4, 4, 4], [[0, 1], [2, 3]]),  # the last has room, but not for any item of the bucket
        ([5, 5, 5], [[0, 1]]),
    ],
)
def test_drop_last_drops_a_batch_that_could_have_taken_more(
    padded: bool, lengths: list[int], batches: list[list[int]]
) -> None:
    sampler = BatchedOrderedSampler(
        lengths, max_tokens=10, padded=padded, buckets=1, drop_last=True
    )
    assert list(sampler) == batches


def test_drop_last_considers_the_shortest_item() -> None:
    """[1, 4] is full at 7; [4] would have taken the 1, if not another 4."""
    sampler = BatchedOrderedSampler([1, 4, 4], max_tokens=7, padded=False, drop_last=True)
    assert list(sampler) == [[0, 1]]


# Arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OrderedSampler(0), "length = 0: expected an integer >= 1"),
        (lambda: RandomSampler(-1), "length = -1: expected an integer >= 1"),
        (lambda: PoolSampler([]), "length = 0: expected an integer >= 1"),
        (lambda: BatchedOrderedSampler([], max_tokens=1), "length = 0: expected an integer >= 1"),
        (lambda: OrderedSampler(5, world_size=0), "world_size = 0: expected an integer >= 1"),
        (lambda: OrderedSampler(5, rank=2, world_size=2), "rank = 2: expected 0 to 1"),
        (lambda: OrderedSampler(5, rank=-1), "rank = -1: expected 0 to 0"),
        (lambda: OrderedSampler(5).advance(-1), "rounds = -1: expected an integer >= 0"),
        (lambda: BatchedOrderedSampler([1]), "set max_tokens, max_batch_size, or both"),
        (lambda: batched(5, max_batch_size=0), "max_batch_size = 0: expected an integer >= 1"),
        (lambda: batched(5, buckets=0), "buckets = 0: expected an integer >= 1"),
        (
            lambda: BatchedOrderedSampler([1, 2.5, 3, 4], max_tokens=2),
            r"lengths\[1\] = 2\.5 exceeds max_tokens = 2",
        ),
        (lambda: BatchedOrderedSampler([1, -1], max_tokens=2), r"lengths\[1\] = -1"),
        (lambda: BatchedOrderedSampler([float("nan")], max_tokens=2), r"lengths\[0\] = nan"),
        (lambda: batched(5, max_tokens=100, drop_last=True), "drops all batches of the 5 items"),
    ],
)
def test_invalid_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_samplers_import_nothing_else_of_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "harness"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("harness.data.sampler")
    imported = {name for name in sys.modules if name.partition(".")[0] == "harness"}
    modules = [f"harness.data.{name}" for name in ("sampler", "batched_sampler", "permutation")]
    assert imported == {"harness", "harness.data", *modules}
