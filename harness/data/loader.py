"""This rank's micro-batches of a dataset: endless, the same number on all ranks, resumable."""

import io
import itertools
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from harness.config.sections import DataConfig
from harness.control.signals import leave_signals_to_parent
from harness.data.batches import Batches
from harness.data.sampler import (
    BatchedOrderedSampler,
    OrderedSampler,
    Place,
    PoolSampler,
    RandomSampler,
    Sampler,
    Span,
)
from harness.data.workers import end_workers
from harness.errors import CheckpointError, ConfigError, TaskError

log = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]


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
    ):
        self.sampler = sampler
        # Each draw of a batched sampler is a complete micro-batch.
        self._rounds = 1 if isinstance(sampler, BatchedOrderedSampler) else micro_batch_size
        self._fetch = Fetch(dataset, collate, seed)
        self._workers = workers
        self._returned = 0
        self._iterator: Iterator[Any] | None = None

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
        return self.sampler.epoch, self.sampler.position

    @property
    def dropped(self) -> list[Span]:
        """In draws of all ranks."""
        return self.sampler.dropped

    def spans(self, start: Place, stop: Place) -> list[Span]:
        """`Sampler.spans`."""
        return self.sampler.spans(start, stop)

    def samples(
        self, spans: Sequence[Span], rank: int | None = None, number: int | None = None
    ) -> list[Any]:
        """The indices of the samples."""
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

    def _prefetch(self) -> Iterator[Any]:
        loader = DataLoader(
            self._fetch,
            sampler=self._indices(),
            batch_size=None,
            collate_fn=unchanged,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # keeps the global generator untouched
            worker_init_fn=leave_signals_to_parent,
        )
        return iter(loader)

    def _indices(self) -> Iterator[tuple[int, list[int]]]:
        """`(number, indices)` of each micro-batch, from the current position on."""
        draws = self.sampler.stream()
        for number in itertools.count(self._returned):
            batch = list(itertools.islice(draws, self._rounds))
            is_batched = isinstance(self.sampler, BatchedOrderedSampler)
            yield number, batch[0] if is_batched else batch


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
        return self.collate([self.dataset[index] for index in indices])


def unchanged(batch: Any) -> Any:
    """The batch: what `Fetch` returns is collated."""
    return batch


class TaskLoader:
    """A loader from the task, iterated epoch after epoch.

    Its position is restored through its `state_dict`, if it has one, or else by skipping batches,
    which is exact only if its order does not depend on the global random generators. Within an
    epoch both are the position of one rank among so many. Only a loader that has an attribute
    `has_global_state`, which is true, continues on another number of ranks: its `state_dict` is the
    same on every rank, and can be loaded on any number of them.
    """

    def __init__(self, loader: Any, world_size: int = 1):
        self.loader = loader
        self.world_size = world_size
        self.epoch = 0
        self.dropped: list[Span] = []
        """In batches of each rank; positions are those without any dropped."""
        self._returned = 0
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
        batch = next(self._iterator, _END)
        if batch is _END:
            raise TaskError(  # on this rank only
                f"train_data: its length is {len(self.loader)} batches, but epoch {self.epoch} "
                f"ended after {self._returned}"
            )
        self._returned += 1
        if self._returned == len(self.loader):
            self.epoch, self._returned, self._iterator = self.epoch + 1, 0, None
        return batch

    def close(self) -> None:
        """Ends the workers of the loader's iterator."""
        end_workers(self._iterator)
        self._iterator = None

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

    def samples(
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
        self.epoch, self._returned = state["epoch"], 0
        self.dropped = [tuple(span) for span in state.get("dropped", ())]
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])
            self._returned = state["given"]
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
    if not hasattr(data, "__len__"):
        raise TaskError(f"train_data: {type(data).__name__} has no length (`__len__`)")
    if len(data) == 0:
        raise TaskError(f"train_data: {type(data).__name__} has no items")
    if isinstance(data, IterableDataset):
        return TaskLoader(_batched(data, config, collate, seed * world_size + rank), world_size)
    if not hasattr(data, "__getitem__"):
        _check_state(data)
        return TaskLoader(data, world_size)
    sampler = _sampler(data, config, seed, rank, world_size)
    loader_seed = seed * world_size + rank
    return Loader(data, sampler, config.micro_batch_size, collate, config.workers, loader_seed)


def _batched(
    samples: "IterableDataset[Any]", config: DataConfig, collate: Collate, seed: int
) -> "DataLoader[Any]":
    return DataLoader(
        samples,
        batch_size=config.micro_batch_size,
        collate_fn=collate,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # keeps the global generator untouched
        worker_init_fn=leave_signals_to_parent,
    )


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
