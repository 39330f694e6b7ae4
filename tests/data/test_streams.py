"""Streams of samples: without a length, with a state or without, divided or read by all."""

import itertools
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from harness.config.sections import DataConfig
from harness.data.batches import Batches
from harness.data.train_batches import train_batches
from harness.errors import CheckpointError, ConfigError, TaskError
from tests.support.streams import Shuffled, Stateful, order_of

LENGTH = 23


def expected(count: int) -> list[int]:
    """The first samples of the concatenated epochs."""
    orders = (order_of(epoch, LENGTH) for epoch in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(orders), count))


def batches_of(data: Any, rank: int = 0, ranks: int = 1, **keys: Any) -> Batches:
    config = DataConfig.model_validate({"micro_batch_size": 2} | keys)
    return train_batches(data, config, list, 0, rank, ranks)


def read(batches: Batches, count: int) -> list[list[int]]:
    return [next(batches) for _ in range(count)]


KINDS = {
    "stateful": lambda: Stateful(LENGTH),
    "stateless": lambda: Shuffled(LENGTH),
}


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    layouts=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 13)), min_size=1, max_size=5
    ),
)
def test_a_strided_stream_resumes_on_any_number_of_ranks(
    kind: str, layouts: list[tuple[int, int, int]]
) -> None:
    """Each sample exactly once in an epoch, in the stream's order."""
    seen: list[int] = []
    state: Any = None
    for ranks, size, rounds in layouts:
        states, per_rank = [], []
        for rank in range(ranks):
            keys = {"split": "stride", "micro_batch_size": size}
            batches = batches_of(KINDS[kind](), rank, ranks, **keys)
            if state is not None:
                batches.load_state_dict(state)
            per_rank.append(read(batches, rounds))
            states.append(batches.state_dict())
        assert all(other == states[0] for other in states)
        state = states[0] | {"world_size": ranks}
        for round in zip(*per_rank, strict=True):
            seen += [sample for samples in zip(*round, strict=True) for sample in samples]
    assert seen == expected(len(seen))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_workers_of_a_strided_stream_may_change(kind: str) -> None:
    state, seen = None, []
    for workers in (2, 0, 3, 1):
        batches = batches_of(KINDS[kind](), split="stride", workers=workers)
        if state is not None:
            batches.load_state_dict(state)
        seen += [sample for batch in read(batches, 5) for sample in batch]
        state = batches.state_dict() | {"world_size": 1}
        batches.close()
    assert seen == expected(40)


def test_samples_that_a_rollback_drops_are_given_to_no_rank() -> None:
    shares = []
    for rank in range(2):
        batches = batches_of(Shuffled(LENGTH), rank, 2, split="stride")
        start, state = batches.place, batches.state_dict()
        read(batches, 2)
        spans = batches.spans(start, batches.place)
        assert spans == [(0, 0, 8)]
        batches.load_state_dict(state)
        batches.drop(spans)
        shares.append(read(batches, 2))
    found = [s for round in zip(*shares, strict=True) for s in zip(*round, strict=True)]
    assert list(itertools.chain(*found)) == expected(16)[8:]


@pytest.mark.parametrize("kind", [Shuffled, Stateful])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_stream_without_length_is_resumed_in_its_third_pass(kind: Any, workers: int) -> None:
    """Also behind the end of some workers: the others' micro-batches keep their order."""
    first = batches_of(kind(LENGTH, divided=True, ranks=(0, 1)), workers=workers)
    epochs: list[list[int]] = [[], [], []]
    while len(epochs[2]) < 15:
        batch = next(first)
        epochs[first.epoch] += batch
    assert [sorted(epoch) for epoch in epochs[:2]] == [list(range(LENGTH))] * 2
    second = batches_of(kind(LENGTH, divided=True, ranks=(0, 1)), workers=workers)
    second.load_state_dict(first.state_dict() | {"world_size": 1})
    assert second.epoch == 2
    rest = read(first, 6)
    assert read(second, 6) == rest
    samples = epochs[2] + [sample for batch in rest for sample in batch]
    assert sorted(samples[:LENGTH]) == list(range(LENGTH))
    first.close()
    second.close()


def test_a_state_is_loaded_and_nothing_read_again() -> None:
    first, again = batches_of(Stateful(LENGTH)), Stateful(LENGTH)
    read(first, 8)
    second = batches_of(again)
    second.load_state_dict(first.state_dict() | {"world_size": 1})
    assert read(second, 2) == read(first, 2)
    assert again.reads == 4


class Restarting(IterableDataset[int]):
    """Its `iter` goes on at its state, which the end of an epoch resets."""

    def __init__(self, length: int):
        self.length, self.at, self.epoch = length, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for number in range(self.at, self.length):
            self.at = number + 1
            yield 100 * self.epoch + number
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class SizedRestarting(Restarting):
    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("split", ["self", "stride"])
@pytest.mark.parametrize("kind", [Restarting, SizedRestarting])
@pytest.mark.parametrize("length", [7, 8])
def test_a_stream_with_a_state_returns_to_any_position(kind: Any, split: str, length: int) -> None:
    """In the same process, as a rollback does, or in another: also to an epoch's beginning."""
    first = batches_of(kind(length), split=split)
    states, read_first = [], []
    for _ in range(10):
        states.append(deepcopy(first.state_dict()) | {"world_size": 1})
        read_first += read(first, 1)
    for number, state in enumerate(states):
        for batches in (first, batches_of(kind(length), split=split)):
            batches.load_state_dict(deepcopy(state))
            assert read(batches, 10 - number) == read_first[number:]


class OwnIterator(IterableDataset[int]):
    """Its own iterator, as litdata's: each `iter` begins again."""

    def __iter__(self) -> "OwnIterator":
        self.at = 0
        return self

    def __next__(self) -> int:
        if self.at == LENGTH:
            raise StopIteration
        self.at += 1
        return self.at - 1


class CountsEpochs(IterableDataset[int]):
    """Without `set_epoch`, as MosaicML's: each `iter` begins its next epoch."""

    next_epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.next_epoch += 1
        return iter(order_of(self.next_epoch, 8))


@pytest.mark.parametrize("split", ["self", "stride"])
def test_a_stream_that_is_its_own_iterator(split: str) -> None:
    assert read(batches_of(OwnIterator(), split=split), 3) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("split", ["self", "stride"])
def test_a_stream_that_counts_its_epochs_resumes(split: str) -> None:
    first, second, third = (batches_of(CountsEpochs(), split=split) for _ in range(3))
    read(first, 4)
    second.load_state_dict(first.state_dict() | {"world_size": 1})
    read(first, 1)
    third.load_state_dict(first.state_dict() | {"world_size": 1})
    assert read(second, 5)[1:] == read(first, 4)
    assert read(third, 1) == [order_of(2, 8)[2:4]]


class MosaicLike:
    """A loader whose dataset counts its epochs, and leaves a state aside that is of one before, as
    MosaicML's; its state counts what was read since the last `iter`."""

    def __init__(self) -> None:
        self.dataset = self
        self.next_epoch, self.read = 0, 0
        self.loaded = (-1, 0)

    def __len__(self) -> int:
        return 4

    def _place(self, epoch: int) -> tuple[int, int]:
        return (epoch, 0) if self.loaded[0] < epoch else self.loaded

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self._place(self.next_epoch)
        self.next_epoch, self.read = epoch + 1, 0
        for number in order_of(epoch, 4)[start:]:
            self.read += 1
            yield [number]

    def state_dict(self) -> dict[str, Any]:
        epoch, start = self._place(self.next_epoch - 1)
        return {"place": (epoch, start + self.read)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["place"]


def test_a_loader_that_counts_its_epochs_returns_to_any_position() -> None:
    batches, states, found = batches_of(MosaicLike()), [], []
    for _ in range(12):
        states.append(batches.state_dict() | {"world_size": 1})
        found.append(next(batches))
    assert found == [[number] for epoch in range(3) for number in order_of(epoch, 4)]
    for place in (10, 6, 1, 2, 4, 1):
        batches.load_state_dict(states[place])
        assert batches.state_dict()["loader"] == states[place]["loader"]
        assert read(batches, 2) == found[place : place + 2], place


class OnceRestored:
    """A loader that forgets what was loaded only where its iterator ends, as litdata's."""

    def __init__(self) -> None:
        self.at, self.is_restored = 0, False

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        start = self.at if self.is_restored else 0
        for number in range(start, 4):
            self.at = number + 1
            yield [number]
        self.is_restored = False

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.is_restored = state["at"], True


class EndlessLoader(OnceRestored):
    """Its length is that of an epoch, and it continues with the next one."""

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            self.at += 1
            yield [self.at]


def test_the_iterator_of_a_loader_with_a_state_is_ended() -> None:
    first, second = batches_of(OnceRestored()), batches_of(OnceRestored())
    read(first, 2)
    second.load_state_dict(first.state_dict() | {"world_size": 1})
    assert read(second, 4) == [[2], [3], [0], [1]]
    assert read(batches_of(EndlessLoader()), 6) == [[1], [2], [3], [4], [5], [6]]


def test_a_generator_function_is_a_stream() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)

    assert read(batches_of(numbers), 4) == [[0, 1], [2, 3], [4], [0, 1]]
    with pytest.raises(TaskError, match="a generator, which can be read only once"):
        batches_of(numbers())
    with pytest.raises(TaskError, match="a int, expected a map-style dataset"):
        batches_of(3)


def test_the_global_generators_give_the_same_order_again() -> None:
    def shuffled() -> Iterator[int]:
        numbers = list(range(20))
        random.shuffle(numbers)
        yield from (number + 100 * random.randrange(9) for number in numbers)

    for split in ("self", "stride"):
        first, second = (batches_of(shuffled, split=split) for _ in range(2))
        random.seed(5)
        read(first, 7)
        random.seed(6)
        second.load_state_dict(first.state_dict() | {"world_size": 1})
        assert read(second, 6) == read(first, 6)


class Unrepeatable(Shuffled):
    """In an order that nothing determines."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.SystemRandom().sample(range(1000), 1000))


@pytest.mark.parametrize("split", ["self", "stride"])
def test_what_can_neither_be_loaded_nor_read_again_is_refused(split: str) -> None:
    first, second = (batches_of(Unrepeatable(LENGTH), split=split) for _ in range(2))
    read(first, 2)
    second.load_state_dict(first.state_dict() | {"world_size": 1})
    with pytest.raises(CheckpointError, match="Unrepeatable has no state_dict, and the epoch now"):
        next(second)


class UnrepeatableLoader:
    def __iter__(self) -> Iterator[list[int]]:
        return ([number] for number in iter(Unrepeatable(1)))


def test_so_is_a_loader_of_batches() -> None:
    first, second = (batches_of(UnrepeatableLoader()) for _ in range(2))
    read(first, 2)
    with pytest.raises(CheckpointError, match="UnrepeatableLoader has no state_dict, and the epo"):
        second.load_state_dict(first.state_dict() | {"world_size": 1})


def test_a_dataloader_that_shuffles_without_a_seed_resumes() -> None:
    """Its epochs begin with generators that are seeded."""
    loaders = [DataLoader(range(30), 4, shuffle=True, collate_fn=list) for _ in range(2)]  # type: ignore[arg-type]
    first, second = (batches_of(loader) for loader in loaders)
    torch.manual_seed(1)
    assert sorted(s for batch in read(first, 8) for s in batch) == list(range(30))
    read(first, 3)
    torch.manual_seed(2)
    second.load_state_dict(first.state_dict() | {"world_size": 1})
    assert read(second, 9) == read(first, 9)


def test_another_division_is_refused() -> None:
    states = {}
    for split in ("self", "stride"):
        batches = batches_of(Shuffled(LENGTH), split=split, workers=0)
        read(batches, 2)
        states[split] = batches.state_dict()
    own = states["self"]
    with pytest.raises(CheckpointError, match=r"on 3 ranks: Shuffled is 2 .*data.split = 'stride'"):
        batches_of(Shuffled(LENGTH), 0, 3).load_state_dict(own | {"world_size": 1})
    with pytest.raises(CheckpointError, match=r"workers = 2: .*among 1 workers.*data.split = 'str"):
        batches_of(Shuffled(LENGTH), workers=2).load_state_dict(own | {"world_size": 1})
    with pytest.raises(CheckpointError, match=r"resume with data\.split = 'self'"):
        batches_of(Shuffled(LENGTH), split="stride").load_state_dict(own)
    with pytest.raises(CheckpointError, match=r"of a run with data\.split = 'stride'"):
        batches_of(Shuffled(LENGTH)).load_state_dict(states["stride"])
    with pytest.raises(ConfigError, match="train_data is a list, expected a stream"):
        batches_of([1, 2], split="stride")


def test_a_stream_without_samples_is_an_error() -> None:
    for split in ("self", "stride"):
        with pytest.raises(TaskError, match=r"epoch 0 .*has no"):
            next(batches_of(Shuffled(0), split=split))


def test_an_error_names_the_sample() -> None:
    def failing() -> Iterator[int]:
        yield from range(3)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken") as caught:
        read(batches_of(failing), 2)
    assert "while reading sample 3 of epoch 0" in caught.value.__notes__[0]
