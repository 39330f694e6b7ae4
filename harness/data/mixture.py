"""Several datasets drawn from by weight, resumable on any number of ranks.

Usable without harness, like `harness.data.sampler`: a `Mixture` is one dataset, one source after
another, and a `MixtureSampler` draws its indices.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from harness.data.permutation import Permutation, mixed
from harness.data.sampler import Place, RandomSampler, Sampler, Span

BLOCK = 8192
"""Most draws, of all ranks, whose sources are chosen at once."""


class Mixture(Dataset[Any]):
    """Map-style datasets, by name, one after another. Raises ValueError for an empty one."""

    def __init__(self, sources: Mapping[str, Any]):
        self.sources = dict(sources)
        self.lengths = {name: len(source) for name, source in sources.items()}
        for name, length in self.lengths.items():
            if not length:
                raise ValueError(f"the source {name!r} has no items")
        self._names = list(self.sources)
        self._ends = list(accumulate(self.lengths.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[str, int]:
        """The source that an item is of, and its index in that."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self._names[number], index - (self._ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> Any:
        name, item = self.locate(index)
        return self.sources[name][item]


class MixtureSampler(Sampler[int]):
    """One rank's share of an endless stream of draws from a `Mixture`.

    Each draw, by all ranks together, chooses a source by weight, from its number and the seed
    alone, and takes that source's next item. Every source has its own epochs, each a new
    permutation: it is gone through completely before an item comes again. The draws are the same
    for any number of ranks; rank r of W takes draws r, r + W, ... `epoch` is the number of draws in
    units of the mixture's length.

    `weights`: by source, of any scale; 0 leaves a source out for now. Raises ValueError if they do
    not fit the sources.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        weights: Mapping[str, float],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        total = sum(lengths.values())
        super().__init__(total, seed=seed, rank=rank, world_size=world_size)
        self.lengths = dict(lengths)
        self._starts = dict(zip(lengths, accumulate(lengths.values(), initial=0), strict=False))
        self._taken = dict.fromkeys(lengths, 0)  # of draws below `_raw`
        self._draws = 0  # without those that are dropped
        self._raw = 0  # with them
        self._dropped_raw = np.empty(0, np.int64)
        self.set_weights(weights)
        self._order_sources()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Draws with other weights from the current position on; call `stream` again afterwards."""
        check_weights(weights, list(self.lengths))
        self._weights = {name: float(weights[name]) for name in self.lengths}
        shares = np.cumsum(list(self._weights.values()))
        self._bounds = shares / shares[-1]

    def order(self, epoch: int) -> Any:
        raise TypeError("a mixture has no epochs; its sources have")

    @property
    def epoch(self) -> int:
        return self._draws // self.length

    @property
    def position(self) -> int:
        """Draws since then, by all ranks together."""
        return self._draws % self.length

    @property
    def place(self) -> Place:
        return 0, self._draws

    def passes(self) -> dict[str, float]:
        """How often each source has been gone through, by name."""
        return {name: taken / self.lengths[name] for name, taken in self._taken.items()}

    def __len__(self) -> int:
        return -(-(self.length - self.position) // self.world_size)

    def stream(self) -> Iterator[int]:
        first, raw, taken = self._draws, self._raw, dict(self._taken)
        rounds = 16
        while True:
            count = rounds * self.world_size
            numbers = self._raws(np.arange(first, first + count))
            own = numbers[self.rank :: self.world_size] - raw
            yield from self._indices(raw, int(numbers[-1]) + 1 - raw, own, taken).tolist()
            first, raw = first + count, int(numbers[-1]) + 1
            rounds = max(1, min(2 * rounds, BLOCK // self.world_size))

    def _indices(
        self, first: int, count: int, wanted: np.ndarray, taken: dict[str, int]
    ) -> np.ndarray:
        """The indices of the wanted ones of `count` draws from draw `first` on, which are counted
        in `taken`."""
        sources = self._sources_of(first, count)
        is_wanted = np.zeros(count, bool)
        is_wanted[wanted] = True
        indices = np.empty(count, np.int64)  # of which those of others stay empty
        for number, name in enumerate(self.lengths):
            (drawn,) = np.nonzero(sources == number)
            places = taken[name] + np.flatnonzero(is_wanted[drawn])
            items = self._orders_by_source[name][places]
            indices[drawn[is_wanted[drawn]]] = self._starts[name] + items
            taken[name] += len(drawn)
        return indices[wanted]

    def advance(self, rounds: int = 1) -> None:
        if rounds < 0:
            raise ValueError(f"rounds = {rounds}: expected an integer >= 0")
        if not rounds:
            return
        self._draws += rounds * self.world_size
        end = self._raw_end()
        for name, more in self._counts(self._raw, end).items():
            self._taken[name] += more
        self._raw = end

    def spans(self, start: Place, stop: Place) -> list[Span]:
        return [(0, start[1], stop[1])] if start[1] < stop[1] else []

    def drawn_in(self, spans: Iterable[Span]) -> list[int]:
        found: list[int] = []
        for _, start, stop in spans:
            numbers = self._raws(np.arange(start, stop))
            first, end = int(numbers[0]), int(numbers[-1]) + 1
            counts = self._counts(min(first, self._raw), max(first, self._raw))
            sign = -1 if first < self._raw else 1
            taken = {name: self._taken[name] + sign * count for name, count in counts.items()}
            found += self._indices(first, end - first, numbers - first, taken).tolist()
        return found

    def drop(self, spans: Sequence[Span]) -> None:
        self.dropped = list(spans)
        self._dropped_raw = np.empty(0, np.int64)
        for _, start, stop in spans:
            numbers = self._raws(np.arange(start, stop))
            self._dropped_raw = np.sort(np.concatenate([self._dropped_raw, numbers]))

    def _raws(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers of draws (int64) if dropped ones count, too."""
        dropped = self._dropped_raw
        return numbers + np.searchsorted(dropped - np.arange(len(dropped)), numbers, side="right")

    def _raw_end(self) -> int:
        """How far the draws so far reach, if dropped ones count."""
        return int(self._raws(np.array([self._draws - 1]))[0]) + 1 if self._draws else 0

    def _counts(self, start: int, end: int) -> dict[str, int]:
        """The draws of each source among some."""
        counts = np.zeros(len(self.lengths), np.int64)
        for first in range(start, end, 1 << 20):
            sources = self._sources_of(first, min(end - first, 1 << 20))
            counts += np.bincount(sources, minlength=len(self.lengths))
        return dict(zip(self.lengths, counts.tolist(), strict=True))

    def _sources_of(self, first: int, count: int) -> np.ndarray:
        """The numbers of the sources of some draws."""
        numbers = np.arange(first, first + count, dtype=np.uint64)
        random = mixed(numbers * np.uint64(0x9E3779B97F4A7C15) + self._key) >> np.uint64(11)
        return np.searchsorted(self._bounds, random * 2.0**-53, side="right")

    def _order_sources(self) -> None:
        self._key = np.uint64(_hashed(f"{self.seed}/sources"))
        self._orders_by_source = {
            name: _Orders(length, _hashed(f"{self.seed}/{name}"))
            for name, length in self.lengths.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values: the same on every rank and for any world size. Without the
        weights, which are settings."""
        dropped = {"dropped": self.dropped} if self.dropped else {}
        position = {"seed": self.seed, "draws": self._draws, "taken": self._taken}
        return self._identity() | position | dropped

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._check_identity(state)
        self._move_to(state, state["taken"])

    def fit_state_dict(self, state: Mapping[str, Any]) -> str:
        """As the base class. The epoch in progress of a source that has changed begins again."""
        if state.get("sampler") != type(self).__name__:
            return f"the mixture begins: the checkpoint has {state.get('sampler')}"
        before, texts = state["lengths"], []
        taken = dict.fromkeys(self.lengths, 0) | {
            name: count for name, count in state["taken"].items() if name in self.lengths
        }
        for name, length in self.lengths.items():
            was = before.get(name)
            if was is None:
                texts.append(f"source {name!r} is new")
            elif was != length:
                epoch = taken[name] // was
                taken[name] = epoch * length
                texts.append(
                    f"source {name!r} has {length} samples, and had {was}: its epoch {epoch} "
                    "begins again"
                )
        texts += [f"source {name!r} is gone" for name in before if name not in self.lengths]
        self._move_to(state, taken)
        return "; ".join(texts)

    def _move_to(self, state: Mapping[str, Any], taken: Mapping[str, int]) -> None:
        self.seed, self._draws = state["seed"], state["draws"]
        self._taken = dict(taken)
        self.drop([tuple(span) for span in state.get("dropped", ())])
        self._raw = self._raw_end()
        self._order_sources()

    def _identity(self) -> dict[str, Any]:
        return {"sampler": type(self).__name__, "lengths": self.lengths}


class _Orders:
    """The permutations of one source, epoch by epoch."""

    def __init__(self, length: int, seed: int) -> None:
        self._sampler = RandomSampler(length, seed=seed)
        self._epoch, self._order = -1, self._sampler.order(0)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The items at ascending places (int64) of one epoch after another."""
        epochs = places // self._sampler.length
        items = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._sampler.order(epoch)
            here = epochs == epoch
            within = places[here] - epoch * self._sampler.length
            order = self._order
            items[here] = (
                order.at(within) if isinstance(order, Permutation) else np.array(order)[within]
            )
        return items


def check_weights(weights: Mapping[str, float], sources: list[str]) -> None:
    """Raises ValueError if there is not one weight for each source, or none is above 0."""
    if set(weights) != set(sources):
        raise ValueError(f"weights of {sorted(weights)}, but the sources are {sorted(sources)}")
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(
        weights.values()
    ):
        raise ValueError(f"weights {dict(weights)}: expected numbers >= 0, and one above 0")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
