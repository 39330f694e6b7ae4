"""This rank's micro-batches of a loader that the task has returned, or of a stream of samples."""

import logging
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from operator import or_
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, RandomSampler

from harness import distributed
from harness.data.batches import WithoutSources
from harness.data.digest import digest
from harness.data.sampler import Place, Span
from harness.data.stream import has_state, length_of, set_epoch, takes_epoch
from harness.data.stream_loader import StreamLoader
from harness.data.workers import end_workers
from harness.distributed.rng import seeded
from harness.errors import CheckpointError, TaskError, counted

log = logging.getLogger(__name__)
log_warning = distributed.global_leader_only(log.warning)


class TaskLoader(WithoutSources):
    """A loader from the task, iterated epoch after epoch, with a length or without.

    Its position is restored through its `state_dict`, if it has one, or else by skipping batches,
    which must then come in the same order again: the random generators are seeded where an epoch
    begins, and an epoch that begins with another batch than before is refused. Within an
    epoch both are the position of one rank among so many. Only a loader that has an attribute
    `has_global_state`, which is true, continues on another number of ranks: its `state_dict` is the
    same on every rank, and can be loaded on any number of them.
    """

    def __init__(self, loader: Any, world_size: int = 1, seed: int = 0):
        """`seed`: of this rank."""
        self.loader = loader
        self.world_size = world_size
        self.ends_together = False
        """Whether the ranks end an epoch together: one that has run out of batches repeats one, as
        padding, until `begin_epoch` is called."""
        self.share, self.skips = 1.0, None
        self.samples = None  # known to the loader only
        self.dropped: list[Span] = []
        """In batches of each rank; positions are those without any dropped."""
        self._seed = seed
        self._epoch = 0
        self._returned = 0  # of the epoch's batches
        self._waits = False  # for the other ranks to end the epoch before this one
        self._loaded: Any = None  # the loader's state, if nothing was read since
        self._held: _Held | None = None
        self._iterator: Iterator[Any] | None = None
        self._first_batch: str | None = None  # digest of the first one returned or held
        self._begins_with: str | None = None  # digest of the epoch's first batch

    def __next__(self) -> Any:
        if self._held is None and not self._waits:
            batch = self._read()
            if batch is not _END:
                self.share = 1.0
                return batch
            self._waits = True
        held = self._hold()
        self.share = 0.0 if self._waits else 1.0
        if not self._waits:
            self._held = None
        return held.batch

    def begin_epoch(self) -> None:
        """All ranks end the epoch, this one also if it has batches left. They are not read, but
        those of a loader with a state are: what it does otherwise, nobody knows."""
        if not self._waits:
            if has_state(self.loader) and not isinstance(self.loader, StreamLoader):
                while self._next() is not _END:
                    pass
            else:
                self._rewind()
                self._epoch, self._returned = self._epoch + 1, 0
        self._waits = False

    def _rewind(self) -> None:
        self.close()
        if isinstance(self.loader, StreamLoader):
            self.loader.rewind()

    def _hold(self) -> "_Held":
        """The next batch, which is read, and not yet returned."""
        if self._held is None:
            state, place = self.state_dict(), self.place
            self._held = _Held(self._read(), state, place)
        return self._held

    def _read(self) -> Any:
        """The next batch that is not dropped; _END if the ranks have to end the epoch first."""
        while True:
            epoch, number = self._epoch, self._returned
            batch = self._next()
            if batch is _END:
                if self.ends_together and not self._waits:
                    return _END
            elif not any(e == epoch and a <= number < b for e, a, b in self.dropped):
                self._first_batch = self._first_batch or digest(batch)
                return batch

    def _next(self) -> Any:
        """The next batch; _END at the end of an epoch, which is then begun."""
        if self._iterator is None:
            self._open()
        assert self._iterator is not None
        if self._returned:
            batch = next(self._iterator, _END)
        else:
            with seeded(self._seed, self._epoch):
                batch = next(self._iterator, _END)
        if batch is _END and self._loaded is not None and not self._returned:
            # It was the state of the end of the epoch before: torchdata's loader ends there again.
            self._iterator = self._loaded = None
            return self._next()
        self._loaded = None
        if batch is _END:
            self._end_epoch()
            return _END
        if not self._returned:
            self._begins_with = digest(batch)
        self._returned += 1
        if not self.ends_together and self._is_over():
            self._leave()
            self._end_epoch()
        return batch

    def _open(self) -> None:
        for part in self._parts_with_epoch():
            set_epoch(part, self._epoch)
        with seeded(self._seed, self._epoch):
            self._iterator = iter(self.loader)

    def _parts_with_epoch(self) -> list[Any]:
        """What is told which epoch begins. Of datasets only MosaicML's, whose state is left aside
        if it is of an epoch before the one that the dataset would begin."""
        names = ("sampler", "batch_sampler", "dataset")
        sampler, batch_sampler, dataset = (getattr(self.loader, name, None) for name in names)
        dataset = dataset if hasattr(dataset, "next_epoch") else None
        return [p for p in (sampler, batch_sampler, dataset, self.loader) if takes_epoch(p)]

    def _is_over(self) -> bool:
        """Whether the epoch is known to end here."""
        if isinstance(self.loader, StreamLoader):
            return self.loader.is_over
        length = length_of(self.loader)
        return length is not None and self._returned >= length

    def _leave(self) -> None:
        """Lets a loader with a state, which has given as many batches as it is long, end its
        iterator, as litdata's must; one that has more of them continues with these."""
        if isinstance(self.loader, StreamLoader) or not has_state(self.loader):
            return
        assert self._iterator is not None
        state = deepcopy(self.loader.state_dict())
        if next(self._iterator, _END) is not _END:
            self.loader.load_state_dict(state)

    def _end_epoch(self) -> None:
        """Raises TaskError, on this rank only, if the epoch should not have ended."""
        if not isinstance(self.loader, StreamLoader):
            length = length_of(self.loader)
            if length is not None and self._returned != length:
                raise TaskError(
                    f"train_data: its length is {length} batches, but epoch {self._epoch} ended "
                    f"after {self._returned}"
                )
        if not self._returned:
            raise TaskError(
                f"train_data: epoch {self._epoch} has no batch for this rank, one of "
                f"{self.world_size}: a stream needs at least as many shards as there are ranks"
            )
        self._epoch, self._returned, self._iterator = self._epoch + 1, 0, None

    def check_ranks(self) -> None:
        """Raises TaskError, on all ranks, if two of them have the same batches. Collective."""
        if self.world_size == 1:
            return
        with distributed.raise_on_all_ranks("train_data"):
            if self._first_batch is None:
                self._hold()
            shuffled = _first_item(self.loader)
        per_rank = distributed.all_gather((self._first_batch, shuffled))
        with distributed.raise_on_all_ranks("train_data"):
            if twins := _equal_ranks([batch for batch, _ in per_rank]):
                raise TaskError(
                    f"train_data: ranks {twins} have the same first micro-batch: the "
                    f"{self._name()} must give each rank its own part, by rank and "
                    "number of ranks (torch's DistributedSampler, for a DataLoader); or return "
                    "the dataset, which harness divides, instead of a loader; a stream of samples "
                    "is divided with data.split = 'stride'"
                )
        if twins := _equal_ranks([item for _, item in per_rank]):
            log_warning(
                "train_data: ranks %s shuffle the same dataset, so that its samples come once on "
                "each of them in an epoch: return the dataset, which harness divides, instead of "
                "the DataLoader, or give that a DistributedSampler",
                twins,
            )

    @property
    def epoch(self) -> int:
        """Epochs that all ranks have completed."""
        return self.place[0] - self._waits

    @property
    def place(self) -> Place:
        """Epoch, and batches of it that this rank has consumed."""
        return (self._epoch, self._returned) if self._held is None else self._held.place

    def close(self) -> None:
        """Ends the workers of the loader's iterator."""
        end_workers(self._iterator)
        if (close := getattr(self._iterator, "close", None)) is not None:
            close()
        self._iterator = self._held = None

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches returned in it, and the loader's own state, if any."""
        if self._held is not None:
            return self._held.state | {"waits": self._waits}
        return {
            "epoch": self._epoch,
            "given": self._returned,
            "loader": self._state() if self._loaded is None else self._loaded,
            "waits": self._waits,
            "begins_with": self._begins_with if self._returned else None,
        } | ({"dropped": self.dropped} if self.dropped else {})

    def _state(self) -> Any:
        return self.loader.state_dict() if has_state(self.loader) else None

    def quick_state_dict(self) -> dict[str, Any] | None:
        """`state_dict`, unless the loader has its own, which may take long."""
        is_quick = getattr(self.loader, "is_quick", not has_state(self.loader))
        return self.state_dict() if is_quick else None

    def spans(self, start: Place, stop: Place) -> list[Span]:
        """The batches of this rank, by epoch."""
        length = length_of(self.loader) or sys.maxsize
        spans = [
            (
                epoch,
                start[1] if epoch == start[0] else 0,
                stop[1] if epoch == stop[0] else length,
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

        Raises CheckpointError if it is of another number of ranks, and not known on this one, or
        if the loader does not return the same batches again.
        """
        if "epoch" not in state:
            raise CheckpointError(
                "cannot resume train_data with data.split = 'self': the checkpoint is of a run "
                "with data.split = 'stride'"
            )
        state = self._on_this_world_size(state)
        self._rewind()
        self._epoch, self._returned, self._loaded = state["epoch"], 0, None
        self._waits, self._begins_with = state.get("waits", False), state.get("begins_with")
        self.dropped = [tuple(span) for span in state.get("dropped", ())]
        if state["loader"] is not None:
            self.loader.load_state_dict(deepcopy(state["loader"]))
            self._returned, self._loaded = state["given"], state["loader"]
        elif state["given"]:
            log.warning("train_data has no state_dict: skipping %d batches", state["given"])
            self._skip(state["given"], self._begins_with)

    def fit_state_dict(self, state: dict[str, Any]) -> str:
        """As `load_state_dict`, or on all ranks at the beginning of the saved epoch. Collective."""
        reason = ""
        with distributed.raise_on_all_ranks("train_data"):
            try:
                self.load_state_dict(state)
            except CheckpointError as error:
                reason = str(error)
        reasons = sorted(distributed.all_reduce({reason}, or_) - {""})
        if not reasons:
            return ""
        anew = {"given": 0, "loader": None, "waits": False, "begins_with": None, "dropped": ()}
        with distributed.raise_on_all_ranks("train_data"):
            self.load_state_dict(state | anew)
        return f"epoch {self._epoch} begins again: {reasons[0]}"

    def _skip(self, batches: int, begins_with: str | None) -> None:
        for _ in range(batches):
            self._next()
        if begins_with is not None and begins_with != self._begins_with:
            raise CheckpointError(
                f"cannot resume train_data within epoch {self._epoch}: "
                f"{type(self.loader).__name__} has no state_dict, and the epoch now begins with "
                "another batch than before: make its order depend on the epoch alone "
                "(`set_epoch(epoch)`, a generator of its own), or give it state_dict and "
                "load_state_dict, as torchdata's StatefulDataLoader has"
            )

    def _on_this_world_size(self, state: dict[str, Any]) -> dict[str, Any]:
        """The position on this number of ranks."""
        saved, current = state.get("world_size", self.world_size), self.world_size
        if saved == current:
            return state
        batches = state["given"] * saved
        if getattr(self.loader, "has_global_state", False) and batches % current == 0:
            return state | {"given": batches // current}
        is_between = not state["given"] and not state.get("waits")
        if is_between and (state["loader"] is None or self._parts_with_epoch()):
            return state | {"loader": None}  # an epoch begins as it is told
        where = f"{state['given']} batches into epoch {state['epoch']}"
        if is_between:  # of epochs that it begins as its state says
            where = f"without a `set_epoch`, and its state before epoch {state['epoch']} is one"
        remedy = (
            "with data.split = 'stride' from the start, a stream resumes on any number"
            if isinstance(self.loader, StreamLoader)
            else "or return a dataset, which harness distributes, instead of a loader"
        )
        raise CheckpointError(
            f"cannot resume train_data on {counted(current, 'rank')}: {self._name()} is {where} "
            f"on each of {counted(saved, 'rank')}, which is no position on {current}: resume on "
            f"{counted(saved, 'rank')}; {remedy}"
        )

    def _name(self) -> str:
        loader = self.loader
        return loader.name if isinstance(loader, StreamLoader) else type(loader).__name__


class _Held(NamedTuple):
    """A batch that was read and is not yet returned."""

    batch: Any
    state: dict[str, Any]
    """Before it, as is `place`."""
    place: Place


def _equal_ranks(digests: Sequence[str | None]) -> list[int]:
    """Ranks with the same digest, if there are any."""
    for found in digests:
        if found is not None and digests.count(found) > 1:
            return [rank for rank, other in enumerate(digests) if other == found]
    return []


def _first_item(loader: Any) -> str | None:
    """A digest of the first item of the dataset that a DataLoader shuffles, if it does so without
    regard to the ranks."""
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, RandomSampler):
        return None
    if loader.sampler.replacement:
        return None
    with seeded(0):  # the same augmentation on every rank
        return digest(loader.dataset[0])


_END = object()
