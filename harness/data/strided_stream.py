"""The micro-batches of a stream that every rank reads completely, and takes its share of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import or_
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from harness import distributed
from harness.data.batches import WithoutSources
from harness.data.fetch import unchanged
from harness.data.sampler import Place, Span
from harness.data.stream import Part, Position, Reader, Rewind, check_resumed, has_state, name_of
from harness.data.workers import act_as_worker, end_workers, loader_options
from harness.distributed.rng import seed_host
from harness.errors import CheckpointError, TaskError


@dataclass
class _Start(Position):
    """Between two rounds: a round is a micro-batch of every rank."""

    total: int = 0
    """Samples read in all epochs, also those that are dropped."""


class StridedStream(WithoutSources):
    """Rank r of W takes every W-th sample of the stream's epochs, one after another.

    All micro-batches are full: the last samples of an epoch come with the first of the next. Each
    of k workers reads the stream, too, and makes every k-th micro-batch of its rank. The position
    is the same on every rank, and continues on any number of ranks and workers.
    """

    def __init__(
        self,
        stream: Any,
        size: int,
        collate: Callable[[list[Any]], Any],
        workers: int = 0,
        start_method: str = "fork",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """`size`: samples in a micro-batch. `seed`: the same on every rank."""
        self._share = _Share(stream, size, collate, seed, rank, world_size)
        self._stream, self._workers, self._start_method = stream, workers, start_method
        self._rewind = Rewind(stream, workers)
        self._asks_stream = has_state(stream) and not workers
        self._start, self._at = _Start(), _Start()
        self._parts: Iterator[Part] | None = None
        self._held: tuple[Part, dict[str, Any]] | None = None  # with the state before it
        self.samples = None  # known to the stream only
        self.share, self.skips = 1.0, None

    def __next__(self) -> Any:
        part = self._read() if self._held is None else self._held[0]
        self._held, self._at = None, part.position
        return part.batch

    def _read(self) -> Part:
        if self._parts is None:
            self._share.start = self._start = self._at
            options = loader_options(self._workers, self._start_method)
            loader = DataLoader(self._share, batch_size=None, collate_fn=unchanged, **options)
            self._parts = iter(loader)
        part = next(self._parts)
        check_resumed(self._stream, self._start, part.resumed)
        return part

    def check_ranks(self) -> None:
        """Raises TaskError, on all ranks, if the stream does not begin alike on all of them.
        Collective."""
        with distributed.raise_on_all_ranks("train_data"):
            if self._held is None and self._parts is None:
                state = self.state_dict()
                self._held = self._read(), state
        read = self._at if self._held is None else self._held[0].position
        with distributed.raise_on_all_ranks("train_data"):
            if len(distributed.all_reduce({read.first}, or_)) > 1:
                raise TaskError(
                    f"data.split = 'stride': epoch {read.epoch} of {name_of(self._stream)} begins "
                    "with different samples on different ranks, but must be the same on all of "
                    "them: if it divides itself, use data.split = 'self'; if its order is random, "
                    "let it depend on the epoch alone (`set_epoch(epoch)`)"
                )

    @property
    def epoch(self) -> int:
        """Completed passes over the stream."""
        return self._at.epoch

    @property
    def place(self) -> Place:
        """0, and the samples that all ranks have read, in all epochs."""
        return 0, self._at.total

    @property
    def dropped(self) -> list[Span]:
        """In samples of all ranks, with those that were dropped before."""
        return self._share.dropped

    def spans(self, start: Place, stop: Place) -> list[Span]:
        """The samples of all ranks."""
        return [(0, start[1], stop[1])] if start[1] < stop[1] else []

    def samples_in(
        self, spans: Sequence[Span], rank: int | None = None, number: int | None = None
    ) -> list[Any]:
        """Unknown."""
        return []

    def drop(self, spans: Sequence[Span]) -> None:
        """They are read, and given to no rank."""
        self._share.dropped = list(spans)

    def close(self) -> None:
        """Ends the workers."""
        end_workers(self._parts)
        self._parts = self._held = None

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank: plain values, and the stream's own state."""
        if self._held is not None:
            return self._held[1]
        at = self._at
        if self._asks_stream and self._parts is not None:
            at = self._share.position(with_state=True)
        return {"split": "stride", "at": asdict(at)} | (
            {"dropped": self.dropped} if self.dropped else {}
        )

    def quick_state_dict(self) -> dict[str, Any] | None:
        """`state_dict`, unless the stream must be asked, which may take long."""
        return None if self._asks_stream else self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position. Raises CheckpointError if it is of a single rank."""
        if state.get("split") != "stride":
            raise CheckpointError(
                "cannot resume train_data with data.split = 'stride': the checkpoint is of a run "
                "whose ranks each had a position of their own: resume with data.split = 'self'"
            )
        self.close()
        self._rewind()
        self._at = _Start(**state["at"])
        self.drop([tuple(span) for span in state.get("dropped", ())])

    def fit_state_dict(self, state: dict[str, Any]) -> str:
        """`load_state_dict`: a stream's length is not known, so that it is at the same place."""
        self.load_state_dict(state)
        return ""


class _Share(IterableDataset):
    """The micro-batches that one process makes."""

    def __init__(
        self,
        stream: Any,
        size: int,
        collate: Callable[[list[Any]], Any],
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._stream, self._collate, self._seed = stream, collate, seed
        self._rank, self._world_size, self._size = rank, world_size, size * world_size
        self.start = _Start()
        self.dropped: list[Span] = []
        self._total = 0
        self._reader: Reader | None = None

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            act_as_worker(None)
        self._total = self.start.total
        self._reader = reader = self._opened(self.start, in_worker=info is not None)
        number, resumed = 0, reader.resumed
        while True:
            samples = self._round(in_worker=info is not None)
            if number % workers == worker:
                position = self.position(with_state=info is not None)
                if info is not None:  # else all ranks would collate with the same random numbers
                    seed_host(self._seed, self._rank, position.total)
                yield Part(worker, self._collate(samples), position, resumed)
            number += 1

    def _opened(self, start: Position, in_worker: bool) -> Reader:
        return Reader(self._stream, start, self._size, (self._seed,), in_worker)

    def _round(self, in_worker: bool) -> list[Any]:
        """This rank's samples of a micro-batch of every rank."""
        own: list[Any] = []
        taken = 0
        while taken < self._size:
            assert self._reader is not None
            samples = self._reader.read(self._size - taken)
            if not samples:
                if not self._reader.samples:
                    epoch = self._reader.epoch
                    raise TaskError(f"train_data: epoch {epoch} of the stream has no samples")
                self._reader = self._opened(Position(self._reader.epoch + 1), in_worker)
            for sample in samples:
                if not self._is_dropped(self._total):
                    if taken % self._world_size == self._rank:
                        own.append(sample)
                    taken += 1
                self._total += 1
        return own

    def _is_dropped(self, number: int) -> bool:
        return any(start <= number < stop for _, start, stop in self.dropped)

    def position(self, with_state: bool) -> _Start:
        """Behind the last round."""
        assert self._reader is not None
        position = self._reader.position(with_state)
        return _Start(**vars(position), total=self._total)
