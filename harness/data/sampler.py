"""Samplers that stop at any draw and resume exactly there, on any number of ranks.

A sampler is one endless stream of draws: the order of epoch 0, then of epoch 1, and so on, each a
pure function of (seed, epoch). A draw is an index into a dataset, or a list of indices. Rank r of W
takes draws r, r + W, r + 2W, ... of the stream; one draw on every rank is a round. A round that an
epoch cannot fill is completed with the first draws of the next epoch, which continues after them:
all ranks draw equally often, and nothing is dropped or drawn twice.

    sampler = RandomSampler(len(dataset), seed=1, rank=rank, world_size=world_size)
    for batch in DataLoader(dataset, batch_size=8, sampler=sampler.stream(), num_workers=2):
        train(batch)
        sampler.advance(8)  # counts them as consumed; prefetched draws are not
"""

import hashlib
import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

from harness.data.permutation import Permutation

Draw = TypeVar("Draw")

STORED = 65_536
"""The longest order that is stored; of a longer one, any place is computed when it is drawn."""
SLICE = 1024
"""Draws that a stream takes from an order at once."""
Place = tuple[int, int]
"""An epoch, and how much of it has been consumed by all ranks together."""

Span = tuple[int, int, int]
"""An epoch, and from where to where in it."""


class Sampler(ABC, Generic[Draw]):
    """One rank's share of an endless stream; subclasses define the order of each epoch.

    `length` is the number of items in the dataset. Raises ValueError for arguments out of range.
    """

    def __init__(self, length: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if length <= 0:
            raise ValueError(f"length = {length}: expected an integer >= 1")
        if world_size <= 0:
            raise ValueError(f"world_size = {world_size}: expected an integer >= 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank}: expected 0 to {world_size - 1} (world_size - 1)")
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._position = 0
        self.dropped: list[Span] = []
        """Taken out of the stream, one after the other: each in what the ones before have left."""
        self._orders: dict[int, Sequence[Draw]] = {}
        self._grown: _Grown | None = None

    @abstractmethod
    def order(self, epoch: int) -> Sequence[Draw]:
        """All draws of an epoch, over all ranks: a pure function of `seed` and `epoch`."""

    def draws(self, epoch: int) -> int:
        """Number of draws in an epoch, over all ranks; override it if it is not `length_in`."""
        return self.length_in(epoch)

    def length_in(self, epoch: int) -> int:
        """The items that an epoch draws from: fewer than `length` if it began before they grew."""
        return self.length if self._grown is None else self._grown.length_in(epoch, self.length)

    @property
    def epoch(self) -> int:
        """The epoch in which the next round begins."""
        return self._epoch

    @property
    def position(self) -> int:
        """Draws of this epoch consumed by all ranks together."""
        return self._position

    @property
    def place(self) -> Place:
        """The position in the stream."""
        return self._epoch, self._position

    def stream(self) -> Iterator[Draw]:
        """This rank's draws from the current position on, endless; does not advance."""
        return self._stream(self._epoch, self._position + self.rank)

    def _stream(self, epoch: int, index: int) -> Iterator[Draw]:
        count = 1  # one draw is cheap, and so are many
        while True:
            order = self._cached_order(epoch)
            while index < len(order):
                drawn = order[index : index + count * self.world_size : self.world_size]
                yield from drawn
                index += len(drawn) * self.world_size
                count = min(2 * count, SLICE)
            index -= len(order)
            epoch += 1

    def __iter__(self) -> Iterator[Draw]:
        """This rank's draws of the rounds that remain in this epoch; does not advance."""
        return islice(self.stream(), len(self))

    def __len__(self) -> int:
        """Rounds that remain in this epoch: the length of `iter`, the same on every rank."""
        return math.ceil((self._draws_left(self._epoch) - self._position) / self.world_size)

    def advance(self, rounds: int = 1) -> None:
        """Counts the next rounds as consumed; all ranks must make the same call."""
        if rounds < 0:
            raise ValueError(f"rounds = {rounds}: expected an integer >= 0")
        self._position += rounds * self.world_size
        while self._position >= (draws := self._draws_left(self._epoch)):
            self._position -= draws
            self._orders.pop(self._epoch, None)
            self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values: the same on every rank and for any world size."""
        position = {"seed": self.seed, "epoch": self._epoch, "position": self._position}
        dropped = {"dropped": self.dropped} if self.dropped else {}
        is_old = self._grown is not None and self._epoch <= self._grown.epoch
        grown = {"grown": astuple(self._grown)} if self._grown is not None and is_old else {}
        return self._identity() | position | dropped | grown

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to the saved position and seed; call `stream` again afterwards.

        Raises ValueError if the state belongs to a sampler of another class, dataset or options,
        whose order differs.
        """
        self._check_identity(state)
        self._grown = _Grown(*state["grown"]) if "grown" in state else None
        self._move(state, [tuple(span) for span in state.get("dropped", ())])

    def fit_state_dict(self, state: Mapping[str, Any]) -> str:
        """Moves to a position in other data, or as near as there is; call `stream` again
        afterwards. Returns what becomes of the epoch in progress; "" if it simply continues.

        Of data that has grown, it ends with the samples and in the order that it began with. Else
        it begins again. So nothing is left out of it.
        """
        try:
            self.load_state_dict(state)
            return ""
        except ValueError as error:
            if self._continues(state) and (before := state["length"]) < self.length:
                self._grown = _Grown(*state.get("grown", (state["epoch"], before)))
                self._move(state, [tuple(span) for span in state.get("dropped", ())])
                return (
                    f"the data has {self.length} samples, and had {before}: epoch {self._epoch} "
                    f"ends with the {self.length_in(self._epoch)} samples that it began with, in "
                    "that order (which leaves none out if the new ones follow them); the next "
                    "epoch has all"
                )
            self._grown = None
            self._move({"position": 0} | {key: state[key] for key in ("seed", "epoch")}, [])
            return f"epoch {self._epoch} begins again, with all {self.length} samples: {error}"

    def _continues(self, state: Mapping[str, Any]) -> bool:
        """Whether the saved epoch's order is known, of whatever length it is."""
        identity = self._identity()
        return all(state.get(key) == identity[key] for key in identity.keys() - {"length"})

    def _move(self, state: Mapping[str, Any], dropped: list[Span]) -> None:
        self.seed, self._epoch = state["seed"], state["epoch"]
        self._position = state["position"]
        self.drop(dropped)

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        for key, expected in self._identity().items():
            if (saved := state.get(key)) != expected:
                raise ValueError(
                    f"{type(self).__name__} cannot load this state: "
                    f"{key} is {saved!r} in the state, but {expected!r} in the sampler"
                )

    def spans(self, start: Place, stop: Place) -> list[Span]:
        """The draws from one place of the stream to another, by epoch."""
        epochs = range(start[0], stop[0] + 1)
        found = [
            (
                epoch,
                start[1] if epoch == start[0] else 0,
                stop[1] if epoch == stop[0] else self._draws_left(epoch),
            )
            for epoch in epochs
        ]
        return [span for span in found if span[1] < span[2]]

    def drawn_in(self, spans: Iterable[Span]) -> list[Draw]:
        """The draws of all ranks in some spans."""
        return [draw for e, start, stop in spans for draw in self._cached_order(e)[start:stop]]

    def drop(self, spans: Sequence[Span]) -> None:
        """Takes these spans, and no others, out of the stream, one after the other: each is a part
        of what the ones before have left. Call `stream` again afterwards.
        """
        self.dropped = list(spans)
        self._orders.clear()

    def _identity(self) -> dict[str, Any]:
        """What two samplers must have in common, besides the seed, to have the same order."""
        return {"sampler": type(self).__name__, "length": self.length}

    def _cached_order(self, epoch: int) -> Sequence[Draw]:
        """`order(epoch)`, cached, along with that of the current epoch, which `advance` needs."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == self._epoch}
            order = self.order(epoch)
            for _, start, stop in self._dropped_in(epoch):
                order = _Without(order, start, stop)
            self._orders[epoch] = order
        return self._orders[epoch]

    def _dropped_in(self, epoch: int) -> list[Span]:
        return [span for span in self.dropped if span[0] == epoch]

    def _draws_left(self, epoch: int) -> int:
        """`draws`, without those that are dropped."""
        return len(self._cached_order(epoch)) if self._dropped_in(epoch) else self.draws(epoch)


@dataclass(frozen=True)
class _Grown:
    """The items were fewer up to the end of an epoch."""

    epoch: int
    length: int

    def length_in(self, epoch: int, now: int) -> int:
        return self.length if epoch <= self.epoch else now


class _Without(Sequence[Draw]):
    """An order without a part of it."""

    def __init__(self, order: Sequence[Draw], start: int, stop: int) -> None:
        self._order, self._start, self._gap = order, start, stop - start

    def __len__(self) -> int:
        return len(self._order) - self._gap

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, slice):
            place = range(len(self))[place]
            return self._order[place if place < self._start else place + self._gap]
        first, last, step = place.indices(len(self))  # ascending
        before = range(first, min(last, self._start), step)
        after = first + len(before) * step + self._gap
        return [
            *self._order[before.start : before.stop : step],
            *self._order[after : last + self._gap : step],
        ]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    # torch uses only the low 32 bits of a CPU generator's seed, so seed and epoch are hashed.
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class OrderedSampler(Sampler[int]):
    """0 to length - 1, in order, every epoch."""

    def order(self, epoch: int) -> Sequence[int]:
        return range(self.length_in(epoch))


class _Shuffler(Sampler[Draw]):
    """A sampler that can draw in a new random order every epoch.

    An order of up to `STORED` items takes 8 bytes an item; a longer one is computed where it is
    drawn from and takes no memory, except if the state that was loaded is older than that.
    """

    def __init__(self, length: int, **ranks: int) -> None:
        super().__init__(length, **ranks)
        self._is_computed = length > STORED

    def shuffled(self, epoch: int) -> Sequence[int]:
        """0 to length - 1 in the order of that epoch."""
        length = self.length_in(epoch)
        if self._is_computed if self._grown is None else length > STORED:
            return Permutation(length, f"{self.seed}/{epoch}")
        # An int64 array takes about as much memory as the tensor, and its items are plain ints.
        permutation = torch.randperm(length, generator=epoch_generator(self.seed, epoch))
        return array("q", permutation.numpy().tobytes())

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"order": "computed"} if self._is_computed else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._is_computed = state.get("order") == "computed"

    def _continues(self, state: Mapping[str, Any]) -> bool:
        is_computed = state.get("order") == "computed"
        return super()._continues(state) and is_computed == (state["length"] > STORED)


class RandomSampler(_Shuffler[int]):
    """A new permutation of 0 to length - 1 every epoch."""

    def order(self, epoch: int) -> Sequence[int]:
        return self.shuffled(epoch)


class PoolSampler(_Shuffler[Any]):
    """A pool that is drawn from without replacement and refilled when it is empty.

    The pool is a sequence, or an int n for range(n). A draw is an index into it, or with `keep_all`
    the item itself. The pool is shuffled once per refill, so that a draw costs O(1); without
    `shuffle` it is drawn in order.
    """

    def __init__(
        self,
        pool: Sequence[Any] | int,
        keep_all: bool = False,
        shuffle: bool = True,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.pool = range(pool) if isinstance(pool, int) else pool
        self.keep_all = keep_all
        self.shuffle = shuffle
        super().__init__(len(self.pool), seed=seed, rank=rank, world_size=world_size)

    def order(self, epoch: int) -> Sequence[Any]:
        indices = self.shuffled(epoch) if self.shuffle else range(self.length_in(epoch))
        return _Picked(self.pool, indices) if self.keep_all else indices

    def sample(self) -> Any:
        """This rank's next draw, which is consumed; all ranks must make the same call."""
        draw = next(self.stream())
        self.advance()
        return draw

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"shuffle": self.shuffle}


class _Picked(Sequence[Any]):
    """The items of a pool at some indices."""

    def __init__(self, pool: Sequence[Any], indices: Sequence[int]) -> None:
        self._pool, self._indices = pool, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._pool[index] for index in self._indices[place]]
        return self._pool[self._indices[place]]
