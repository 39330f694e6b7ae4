"""The micro-batches of a stream that divides itself over the ranks and their workers."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from harness.data.fetch import unchanged
from harness.data.stream import (
    Part,
    Position,
    Reader,
    Rewind,
    check_resumed,
    has_state,
    length_of,
    name_of,
)
from harness.data.workers import act_as_worker, end_workers, loader_options
from harness.errors import CheckpointError, TaskError


class StreamLoader:
    """One epoch of this rank's micro-batches per `iter`, resumable in the middle of it.

    Each worker makes micro-batches of its own samples, and they come in turn. The last one of each
    may be smaller.
    """

    def __init__(
        self,
        stream: Any,
        size: int,
        collate: Callable[[list[Any]], Any],
        workers: int = 0,
        start_method: str = "fork",
        seed: int = 0,
    ):
        """`size`: most samples in a micro-batch."""
        self._share = _Share(stream, size, collate, seed)
        self._stream, self._workers, self._start_method = stream, workers, start_method
        self._rewind = Rewind(stream, workers)
        self._epoch = 0
        self._resumed: tuple[list[Position], int] | None = None  # what `iter` begins with
        self._positions: list[Position] = []  # of each worker; none before the first micro-batch
        self._next_worker = 0
        self.is_over = False
        """Whether as many samples as the stream is long have been read in this epoch."""

    @property
    def name(self) -> str:
        """The stream's, in messages."""
        return name_of(self._stream)

    @property
    def is_quick(self) -> bool:
        """Whether `state_dict` only collects what is known."""
        return self._workers > 0 or not has_state(self._stream)

    def rewind(self) -> None:
        """Before another epoch, or a saved position: leaves this one where it is."""
        self._rewind()
        self._resumed, self._positions = None, []

    def set_epoch(self, epoch: int) -> None:
        """Before the `iter` of an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        fresh = [Position(self._epoch) for _ in range(max(1, self._workers))], 0
        (self._positions, self._next_worker), self._resumed = self._resumed or fresh, None
        self.is_over = False
        starts, length = list(self._positions), length_of(self._stream)
        self._share.begin(starts, self._next_worker)
        parts = iter(self._loader())
        try:
            for part in parts:
                self._take(part, starts[part.worker])
                if length is not None and self._read >= length:
                    self._check_end(length, parts)
                    self._share.leave()
                    self.is_over = True
                yield part.batch
                if self.is_over:
                    return
            if length is not None:
                raise TaskError(  # on this rank only
                    f"train_data: its length is {length} samples, but epoch {self._epoch} ended "
                    f"after {self._read}"
                )
            self._positions = []
        finally:
            end_workers(parts)

    def _loader(self) -> "DataLoader[Any]":
        return DataLoader(
            self._share,
            batch_size=None,
            collate_fn=unchanged,
            **loader_options(self._workers, self._start_method),
        )

    def _take(self, part: Part, start: Position) -> None:
        check_resumed(self._stream, start, part.resumed)
        self._positions[part.worker] = part.position
        self._next_worker = (part.worker + 1) % max(1, self._workers)

    @property
    def _read(self) -> int:
        """Samples of this epoch that all workers have read."""
        return sum(position.samples for position in self._positions)

    def _check_end(self, length: int, parts: Iterator[Part]) -> None:
        """Raises TaskError if several workers yield more samples than there are."""
        if self._workers < 2 or next(parts, None) is None:
            return
        raise TaskError(
            f"train_data: its length is {length} samples, but {name_of(self._stream)} yields more "
            f"with data.workers = {self._workers}: its `__iter__` must yield other samples in each "
            "worker, and all of them once, by torch.utils.data.get_worker_info(); or set "
            "data.workers = 1, also for samples without an end, or data.split = 'stride'"
        )

    def state_dict(self) -> dict[str, Any] | None:
        """Where the readers are, plain values and the stream's own; None between epochs."""
        if self._resumed is not None:
            positions, worker = self._resumed
        elif self.is_over or not self._positions:
            return None
        else:
            positions, worker = self._positions, self._next_worker
            if not self._workers and self._read:
                positions = [self._share.position()]
        return {"readers": [asdict(position) for position in positions], "next": worker}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next `iter` continues there. Raises CheckpointError if other workers have read it."""
        positions = [Position(**reader) for reader in state["readers"]]
        if len(positions) != max(1, self._workers):
            raise CheckpointError(
                f"cannot resume train_data with data.workers = {self._workers}: "
                f"{name_of(self._stream)} is in the middle of an epoch, and divided among "
                f"{len(positions)} workers: resume with data.workers = {len(positions)}; with "
                "data.split = 'stride' from the start, a stream resumes on any number"
            )
        self._resumed = positions, state["next"]


class _Share(IterableDataset):
    """The micro-batches that one process reads."""

    def __init__(
        self, stream: Any, size: int, collate: Callable[[list[Any]], Any], seed: int
    ) -> None:
        self._stream, self._size, self._collate, self._seed = stream, size, collate, seed
        self._starts: list[Position] = []
        self._first_worker = 0
        self._reader: Reader | None = None

    def begin(self, starts: list[Position], first_worker: int) -> None:
        """Where each worker begins, and which of them with the first micro-batch."""
        self._starts, self._first_worker = starts, first_worker

    def __iter__(self) -> Iterator[Part]:
        info, worker = get_worker_info(), 0
        if info is not None:
            worker = (info.id + self._first_worker) % info.num_workers
            act_as_worker(worker)
        in_worker = info is not None
        seed = self._seed, worker
        reader = Reader(self._stream, self._starts[worker], self._size, seed, in_worker)
        self._reader = reader
        while samples := reader.read(self._size):
            batch = self._collate(samples)
            yield Part(worker, batch, reader.position(with_state=in_worker), reader.resumed)

    def leave(self) -> None:
        """In the rank's own process, if it reads: ends the epoch."""
        if self._reader is not None:
            self._reader.leave()

    def position(self) -> Position:
        """In the rank's own process: behind the last micro-batch."""
        assert self._reader is not None
        return self._reader.position(with_state=True)
