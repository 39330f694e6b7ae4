"""From a dataset to this rank's micro-batches: endless, equal in number on all ranks, resumable."""

import io
import itertools
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from harness.config.sections import DataConfig
from harness.control.signals import ignore_signals
from harness.data.sampler import (
    BatchedOrderedSampler,
    OrderedSampler,
    PoolSampler,
    RandomSampler,
    Sampler,
)
from harness.errors import ConfigError, TaskError

log = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]


class Batches(Protocol):
    """An endless iterator of micro-batches that knows its place."""

    @property
    def epoch(self) -> int:
        """Passes over the data that are complete."""
        ...

    def __next__(self) -> Any: ...

    def close(self) -> None:
        """Ends the processes that load ahead."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loader:
    """Micro-batches of a map-style dataset in a sampler's order.

    Workers load ahead, but the position counts the micro-batches that were given out. In a worker
    the random generators are seeded for each micro-batch, so that random augmentation is repeated
    exactly after a resume; without workers it draws from the rank's own generators.
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
        # A batched sampler draws whole micro-batches.
        self._rounds = 1 if isinstance(sampler, BatchedOrderedSampler) else micro_batch_size
        self._fetch = _Fetch(dataset, collate, seed)
        self._workers = workers
        self._given = 0
        self._iterator: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        """Passes over the dataset that are complete."""
        return self.sampler.epoch

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._load_ahead()
        batch = next(self._iterator)
        self.sampler.advance(self._rounds)
        self._given += 1
        return batch

    def close(self) -> None:
        """Ends the workers."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank: plain numbers and the sampler's state."""
        return {"given": self._given, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position. Raises ValueError if it is another dataset's."""
        self.sampler.load_state_dict(state["sampler"])
        self._given = state["given"]
        self._iterator = None

    def _load_ahead(self) -> Iterator[Any]:
        loader = DataLoader(
            self._fetch,
            sampler=self._places(),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # keeps the loader's draws out of the global generator
            worker_init_fn=ignore_signals,
        )
        return iter(loader)

    def _places(self) -> Iterator[tuple[int, list[int]]]:
        """`(number, indices)` of every micro-batch from here on."""
        draws = self.sampler.stream()
        for number in itertools.count(self._given):
            chunk = list(itertools.islice(draws, self._rounds))
            batched = isinstance(self.sampler, BatchedOrderedSampler)
            yield number, chunk[0] if batched else chunk


class _Fetch(Dataset):
    """A dataset of micro-batches: `[(number, indices)]` loads and collates them."""

    def __init__(self, dataset: Any, collate: Collate, seed: int):
        self.dataset, self.collate, self.seed = dataset, collate, seed

    def __getitem__(self, place: tuple[int, list[int]]) -> Any:
        number, indices = place
        if get_worker_info() is not None:
            words = np.random.SeedSequence([self.seed, number]).generate_state(3)
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))
            torch.manual_seed(int(words[2]))
        return self.collate([self.dataset[index] for index in indices])


def _as_it_is(batch: Any) -> Any:
    return batch


class TaskLoader:
    """A loader that the task brought: iterated over and over, on the task's own terms.

    Its position is restored by its own `state_dict`, where it has one, and otherwise by skipping,
    which is exact only if its order does not depend on the global random generators.
    """

    def __init__(self, loader: Any):
        self.loader = loader
        self.epoch = 0
        self._given = 0
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._iterator is None:
            sampler = getattr(self.loader, "sampler", None)
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)  # torch's DistributedSampler
            self._iterator = iter(self.loader)
        batch = next(self._iterator, _END)
        if batch is _END:
            raise RuntimeError(  # of this rank alone
                f"train_data says that it has {len(self.loader)} batches, and ended after "
                f"{self._given} in epoch {self.epoch}"
            )
        self._given += 1
        if self._given == len(self.loader):
            self.epoch, self._given, self._iterator = self.epoch + 1, 0, None
        return batch

    def close(self) -> None:
        """Lets go of the loader's iterator, which ends its workers."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches given out in it, and the loader's own state if it has one."""
        own = self.loader.state_dict() if hasattr(self.loader, "state_dict") else None
        return {"epoch": self.epoch, "given": self._given, "loader": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position."""
        self.epoch, self._given, self._iterator = state["epoch"], 0, None
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])
            self._given = state["given"]
        elif state["given"]:
            log.warning("train_data has no state_dict: skipping %d batches", state["given"])
            for _ in range(state["given"]):
                next(self)


_END = object()


def train_batches(
    data: Any, config: DataConfig, collate: Collate, seed: int, rank: int, world_size: int
) -> Batches:
    """The training micro-batches of one rank. Raises TaskError if there are none to be had."""
    if not hasattr(data, "__len__"):
        raise TaskError(f"train_data: {type(data).__name__} has no length (`__len__`)")
    if len(data) == 0:
        raise TaskError(f"train_data: {type(data).__name__} has no items")
    if not hasattr(data, "__getitem__"):
        _check_state(data)
        return TaskLoader(data)
    sampler = _sampler(data, config, seed, rank, world_size)
    loader_seed = seed * world_size + rank
    return Loader(data, sampler, config.micro_batch_size, collate, config.workers, loader_seed)


def _check_state(loader: Any) -> None:
    """Raises TaskError if a loader's state could be saved, but not be read back safely."""
    if not hasattr(loader, "state_dict"):
        return
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        raise TaskError(
            f"train_data: the state_dict of {type(loader).__name__} holds more than tensors and "
            "plain values (numpy's, for instance): it could be saved, but not be resumed from"
        ) from None


def _sampler(data: Any, config: DataConfig, seed: int, rank: int, world_size: int) -> Sampler:
    shard: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
    match config.sampler:
        case "random":
            return RandomSampler(len(data), **shard)
        case "ordered":
            return OrderedSampler(len(data), **shard)
        case "pool":
            return PoolSampler(len(data), **shard)
        case "batched":
            lengths: Sequence[int] | None = getattr(data, "lengths", None)
            if lengths is None:
                raise ConfigError(
                    f"data.sampler = 'batched' needs train_data.lengths (the length of every "
                    f"sample); {type(data).__name__} has none"
                )
            try:
                return BatchedOrderedSampler(
                    lengths,
                    max_tokens=config.max_tokens or None,
                    max_batch_size=config.micro_batch_size,
                    buckets=config.buckets,
                    shuffle=True,
                    **shard,
                )
            except ValueError as error:
                raise ConfigError(f"data.sampler = 'batched': {error}") from None


def eval_shares(length: int, micro_batch_size: int, rank: int, world_size: int) -> Iterator[range]:
    """The samples of each micro-batch of one rank's share of the held-out data, each sample once.

    Every rank gets the same number of micro-batches, so that none waits for another; where a rank's
    share has run out they are empty.
    """
    for start in range(0, length, micro_batch_size * world_size):
        first = start + rank * micro_batch_size
        yield range(first, min(first + micro_batch_size, length))
