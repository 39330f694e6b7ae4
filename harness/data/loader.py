"""This rank's micro-batches of a dataset: endless, the same number on all ranks, resumable."""

import io
import itertools
import logging
import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from harness.config.sections import DataConfig
from harness.data.batches import Batches
from harness.data.mixture import Mixture, MixtureSampler
from harness.data.sampler import (
    BatchedOrderedSampler,
    OrderedSampler,
    Place,
    PoolSampler,
    RandomSampler,
    Sampler,
    Span,
)
from harness.data.workers import end_workers, loader_options
from harness.errors import CheckpointError, ConfigError, TaskError, first_few

log = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]
Counted = tuple[int, Any]
"""`(number of samples, batch)`."""

MOST_SAMPLES = 64
"""How many indices of samples an error's note contains."""


class Loader:
    """Micro-batches of a map-style dataset in a sampler's order.

    Workers prefetch, but the position counts only micro-batches that were returned. Workers seed
    the random generators for each micro-batch, so that random augmentation is repeated exactly
    after a resume; without workers it draws from the rank's own generators.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Sampler,
        micro_batch_size: int,
        collate: Collate,
        workers: int = 0,
        seed: int = 0,
        start_method: str = "fork",
    ):
        self.sampler = sampler
        # Each draw of a batched sampler is a complete micro-batch.
        self._rounds = 1 if isinstance(sampler, BatchedOrderedSampler) else micro_batch_size
        self._fetch = Fetch(dataset, collate, seed)
        self._workers, self._start_method = workers, start_method
        self._returned = 0
        self._iterator: Iterator[Any] | None = None
        self._drawn: deque[list[int]] = deque()  # of the micro-batches that are being fetched
        self.samples: list[int] | None = None

    @property
    def epoch(self) -> int:
        """Completed passes over the dataset."""
        return self.sampler.epoch

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._prefetch()
        batch = next(self._iterator)
        self.samples = self._drawn.popleft()
        self.sampler.advance(self._rounds)
        self._returned += 1
        return batch

    def close(self) -> None:
        """Ends the workers."""
        end_workers(self._iterator)
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank: plain numbers and the sampler's state."""
        return {"given": self._returned, "sampler": self.sampler.state_dict()}

    def quick_state_dict(self) -> dict[str, Any] | None:
        """`state_dict`."""
        return self.state_dict()

    @property
    def place(self) -> Place:
        """Epoch, and draws of it that all ranks together have consumed."""
        return self.sampler.place

    @property
    def dropped(self) -> list[Span]:
        """In draws of all ranks."""
        return self.sampler.dropped

    def spans(self, start: Place, stop: Place) -> list[Span]:
        """`Sampler.spans`."""
        return self.sampler.spans(start, stop)

    def samples_in(
        self, spans: Sequence[Span], rank: int | None = None, number: int | None = None
    ) -> list[Any]:
        """The indices of the samples of all ranks, or of one rank's micro-batch."""
        draws = self.sampler.drawn_in(spans)
        if rank is not None and number is not None:
            draws = draws[rank :: self.sampler.world_size][number * self._rounds :][: self._rounds]
        is_batched = isinstance(self.sampler, BatchedOrderedSampler)
        return list(itertools.chain.from_iterable(draws)) if is_batched else draws

    def drop(self, spans: Sequence[Span]) -> None:
        """`Sampler.drop`: every rank takes its share of the draws that are left."""
        self.sampler.drop(spans)
        self.close()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position. Raises ValueError if it belongs to another dataset."""
        self.sampler.load_state_dict(state["sampler"])
        self._returned = state["given"]
        self.close()

    def passes(self) -> dict[str, float]:
        """How often each source of a mixture has been gone through; else nothing."""
        return self.sampler.passes() if isinstance(self.sampler, MixtureSampler) else {}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Other weights of a mixture's sources, from the current position on."""
        assert isinstance(self.sampler, MixtureSampler)
        self.sampler.set_weights(weights)
        self.close()

    def _prefetch(self) -> Iterator[Any]:
        loader = DataLoader(
            self._fetch,
            sampler=self._indices(),
            batch_size=None,
            collate_fn=unchanged,
            **loader_options(self._workers, self._start_method),
        )
        return iter(loader)

    def _indices(self) -> Iterator[tuple[int, list[int]]]:
        """`(number, indices)` of each micro-batch, from the current position on."""
        draws = self.sampler.stream()
        self._drawn.clear()
        for number in itertools.count(self._returned):
            batch = list(itertools.islice(draws, self._rounds))
            is_batched = isinstance(self.sampler, BatchedOrderedSampler)
            self._drawn.append(batch[0] if is_batched else batch)
            yield number, self._drawn[-1]


class Fetch(Dataset):
    """A dataset of micro-batches: indexing with `(number, indices)` loads and collates one."""

    def __init__(self, dataset: Any, collate: Collate, seed: int):
        self.dataset, self.collate, self.seed = dataset, collate, seed

    def __getitem__(self, batch: tuple[int, list[int]]) -> Any:
        number, indices = batch
        if get_worker_info() is not None:
            words = np.random.SeedSequence([self.seed, number]).generate_state(3)
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))
            torch.manual_seed(int(words[2]))
        index: int | None = None
        try:
            samples = []
            for index in indices:
                samples.append(self.dataset[index])
            index = None
            return self.collate(samples)
        except Exception as error:
            what = "collating" if index is None else f"reading sample {index} of"
            error.add_note(f"while {what} the samples {first_few(indices, MOST_SAMPLES)}")
            raise


def unchanged(batch: Any) -> Any:
    """The batch: what `Fetch` returns is collated."""
    return batch


class CountingCollate:
    """Collates samples into a `Counted`; workers may unpickle it."""

    def __init__(self, collate: Collate):
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Counted:
        return len(samples), self.collate(samples)


class TaskLoader:
    """A loader from the task, iterated epoch after epoch.

    Its position is restored through its `state_dict`, if it has one, or else by skipping batches,
    which is exact only if its order does not depend on the global random generators. Within an
    epoch both are the position of one rank among so many. Only a loader that has an attribute
    `has_global_state`, which is true, continues on another number of ranks: its `state_dict` is the
    same on every rank, and can be loaded on any number of them.
    """

    def __init__(self, loader: Any, world_size: int = 1, samples: Sized | None = None):
        """`samples`: those of an epoch on this rank, if the loader is a DataLoader of `Counted`
        batches. Each of its workers makes batches of its own samples, so there may be more of them
        than the DataLoader's length."""
        self.loader = loader
        self.world_size = world_size
        self.epoch = 0
        self._samples = samples
        self.samples = None  # known to the loader only
        self.dropped: list[Span] = []
        """In batches of each rank; positions are those without any dropped."""
        self._returned = 0
        self._read = 0  # of the epoch's batches, or samples
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        while True:
            epoch, number = self.place
            batch = self._next()
            if not any(e == epoch and start <= number < stop for e, start, stop in self.dropped):
                return batch

    def _next(self) -> Any:
        if self._iterator is None:
            sampler = getattr(self.loader, "sampler", None)
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)  # torch's DistributedSampler
            self._iterator = iter(self.loader)
        length = len(self.loader if self._samples is None else self._samples)
        item = next(self._iterator, _END)
        if item is _END:
            unit = "batches" if self._samples is None else "samples"
            raise TaskError(  # on this rank only
                f"train_data: its length is {length} {unit}, but epoch {self.epoch} ended after "
                f"{self._read}"
            )
        size, batch = (1, item) if self._samples is None else item
        self._returned += 1
        self._read += size
        if self._read >= length:
            self._check_end(self._iterator)
            self.epoch, self._returned, self._read = self.epoch + 1, 0, 0
            self._iterator = None
        return batch

    def _check_end(self, iterator: Iterator[Any]) -> None:
        """Raises TaskError if several workers yield more samples than there are."""
        if self._samples is None or self.loader.num_workers < 2 or next(iterator, _END) is _END:
            return
        raise TaskError(
            f"train_data: its length is {len(self._samples)} samples, but "
            f"{type(self._samples).__name__} yields more with data.workers = "
            f"{self.loader.num_workers}: its `__iter__` must yield other samples in each worker, "
            "and all of them once, by torch.utils.data.get_worker_info(); or set data.workers = 1, "
            "also for samples without an end"
        )

    def close(self) -> None:
        """Ends the workers of the loader's iterator."""
        end_workers(self._iterator)
        self._iterator = None

    def passes(self) -> dict[str, float]:
        """Nothing: what the task's loader reads is not known."""
        return {}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Never called: only a dict of datasets is a mixture."""
        raise AssertionError

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches returned in it, and the loader's own state, if any."""
        own = self.loader.state_dict() if hasattr(self.loader, "state_dict") else None
        dropped = {"dropped": self.dropped} if self.dropped else {}
        return {"epoch": self.epoch, "given": self._returned, "loader": own} | dropped

    def quick_state_dict(self) -> dict[str, Any] | None:
        """`state_dict`, unless the loader has its own, which may take long."""
        return None if hasattr(self.loader, "state_dict") else self.state_dict()

    @property
    def place(self) -> Place:
        """Epoch, and batches of it that each rank has consumed."""
        return self.epoch, self._returned

    def spans(self, start: Place, stop: Place) -> list[Span]:
        """The batches of each rank, by epoch."""
        spans = [
            (
                epoch,
                start[1] if epoch == start[0] else 0,
                stop[1] if epoch == stop[0] else len(self.loader),
            )
            for epoch in range(start[0], stop[0] + 1)
        ]
        return [span for span in spans if span[1] < span[2]]

    def samples_in(
        self, spans: Sequence[Span], rank: int | None = None, number: int | None = None
    ) -> list[Any]:
        """Unknown."""
        return []

    def drop(self, spans: Sequence[Span]) -> None:
        """They are read, and not returned."""
        self.dropped = list(spans)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position.

        Raises CheckpointError if it is of another number of ranks, and not known on this one.
        """
        state = self._on_this_world_size(state)
        self.close()
        self.epoch, self._returned, self._read = state["epoch"], 0, 0
        self.dropped = [tuple(span) for span in state.get("dropped", ())]
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])
            self._returned = self._read = state["given"]
        elif state["given"]:
            log.warning("train_data has no state_dict: skipping %d batches", state["given"])
            for _ in range(state["given"]):
                self._next()

    def _on_this_world_size(self, state: dict[str, Any]) -> dict[str, Any]:
        """The position on this number of ranks."""
        saved, current = state.get("world_size", self.world_size), self.world_size
        if saved == current or (state["loader"] is None and not state["given"]):
            return state
        batches = state["given"] * saved
        if getattr(self.loader, "has_global_state", False) and batches % current == 0:
            return state | {"given": batches // current}
        raise CheckpointError(
            f"cannot resume train_data on {current} ranks: {type(self.loader).__name__} is "
            f"{state['given']} batches into epoch {state['epoch']} on each of {saved} ranks, which "
            f"is no position on {current}: resume on {saved} ranks, or return a dataset, which "
            "harness distributes, instead of a loader"
        )


_END = object()


def train_batches(
    data: Any, config: DataConfig, collate: Collate, seed: int, rank: int, world_size: int
) -> Batches:
    """The training micro-batches of one rank. Raises TaskError if `data` is not usable.

    A torch IterableDataset, also one with `__getitem__`, yields the samples of this rank.
    """
    if isinstance(data, Mapping):
        data = _mixture(data)
    if config.mix and not isinstance(data, Mixture):
        raise ConfigError(
            f"data.mix: train_data is a {type(data).__name__}, expected a dict of datasets"
        )
    if not hasattr(data, "__len__"):
        raise TaskError(f"train_data: {type(data).__name__} has no length (`__len__`)")
    if len(data) == 0:
        raise TaskError(f"train_data: {type(data).__name__} has no items")
    if isinstance(data, IterableDataset):
        loader = _batched(data, config, collate, seed * world_size + rank)
        return TaskLoader(loader, world_size, data)
    if not hasattr(data, "__getitem__"):
        _check_state(data)
        return TaskLoader(data, world_size)
    sampler = _sampler(data, config, seed, rank, world_size)
    loader_seed = seed * world_size + rank
    size, workers = config.micro_batch_size, config.workers
    return Loader(data, sampler, size, collate, workers, loader_seed, config.start_method)


def _batched(
    samples: "IterableDataset[Any]", config: DataConfig, collate: Collate, seed: int
) -> "DataLoader[Any]":
    return DataLoader(
        samples,
        batch_size=config.micro_batch_size,
        collate_fn=CountingCollate(collate),
        **loader_options(config.workers, config.start_method, torch.Generator().manual_seed(seed)),
    )


def mixture_weights(config: DataConfig) -> dict[str, float]:
    """The configured weights of a mixture's sources, by name."""
    return {name: source.weight for name, source in config.mix.items()}


def _mixture(sources: Mapping[str, Any]) -> Mixture:
    """Raises TaskError if a source is not a map-style dataset with items."""
    for name, source in sources.items():
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise TaskError(
                f"train_data[{name!r}]: {type(source).__name__}, expected a map-style dataset"
            )
    try:
        return Mixture(sources)
    except ValueError as error:
        raise TaskError(f"train_data: {error}") from None


def train_lengths(data: Any) -> dict[str, int]:
    """The lengths of the training data, by what they are called in messages."""
    if isinstance(data, Mapping):
        return {f"train_data[{name!r}]": len(source) for name, source in data.items()}
    return {"train_data": len(data)}


def _check_state(loader: Any) -> None:
    """Raises TaskError if a loader's state could be saved, but not loaded with weights_only."""
    if not hasattr(loader, "state_dict"):
        return
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        raise TaskError(
            f"train_data: the state_dict of {type(loader).__name__} must contain only tensors and "
            "plain values (no numpy values, for instance): otherwise a run could not resume"
        ) from None


def _sampler(data: Any, config: DataConfig, seed: int, rank: int, world_size: int) -> Sampler:
    ranks: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
    if isinstance(data, Mixture):
        if config.sampler != "random":
            raise ConfigError(f"data.sampler = {config.sampler!r}: a mixture needs 'random'")
        weights = mixture_weights(config) or data.lengths
        try:
            return MixtureSampler(data.lengths, weights, **ranks)
        except ValueError as error:
            raise ConfigError(f"data.mix: {error}") from None
    match config.sampler:
        case "random":
            return RandomSampler(len(data), **ranks)
        case "ordered":
            return OrderedSampler(len(data), **ranks)
        case "pool":
            return PoolSampler(len(data), **ranks)
        case "batched":
            lengths: Sequence[int] | None = getattr(data, "lengths", None)
            if lengths is None:
                raise ConfigError(
                    f"data.sampler = 'batched' needs train_data.lengths (the length of every "
                    f"sample), which {type(data).__name__} does not have"
                )
            try:
                return BatchedOrderedSampler(
                    lengths,
                    max_tokens=config.max_tokens or None,
                    max_batch_size=config.micro_batch_size,
                    buckets=config.buckets,
                    shuffle=True,
                    **ranks,
                )
            except ValueError as error:
                raise ConfigError(f"data.sampler = 'batched': {error}") from None
