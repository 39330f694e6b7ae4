"""This rank's micro-batches of a loader that the task has returned, or of a stream of samples."""

import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

from harness.data.sampler import Place, Span
from harness.data.workers import end_workers
from harness.errors import CheckpointError, TaskError

log = logging.getLogger(__name__)


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
        item: Any = next(self._iterator, _END)
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
