"""A stream of samples, read from a position on, in the rank's process or in a worker's."""

from collections.abc import Iterator, Sized
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from harness.data.digest import digest
from harness.distributed.rng import seed_host, seeded
from harness.errors import CheckpointError


def is_stream(data: Any) -> bool:
    """Whether a task's data is a stream of samples: an IterableDataset, or a function that returns
    an iterator of samples, as a generator function does."""
    if isinstance(data, IterableDataset):
        return True
    return callable(data) and not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))


def length_of(data: Any) -> int | None:
    """The length; None if there is none, as for a DataLoader of a stream without one."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


def has_state(data: Any) -> bool:
    """Whether it has a `state_dict` that can be called without arguments, and loads it."""
    if not (hasattr(data, "state_dict") and hasattr(data, "load_state_dict")):
        return False
    optional = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    try:
        parameters = signature(data.state_dict).parameters.values()
    except ValueError:  # of a function in C, it is not known
        return True
    return all(p.default is not Parameter.empty or p.kind in optional for p in parameters)


class Rewind:
    """Takes a stream that has a state, and is read in this process, back to how the task made it:
    an epoch that is left in the middle would be continued by the next `iter`."""

    def __init__(self, stream: Any, workers: int):
        self._stream = stream
        self._state = stream.state_dict() if has_state(stream) and not workers else None
        self._state = deepcopy(self._state)

    def __call__(self) -> None:
        if self._state is not None:
            self._stream.load_state_dict(deepcopy(self._state))


@dataclass
class Position:
    """How far a stream is read, by one reader."""

    epoch: int = 0
    samples: int = 0
    """Of this epoch."""
    state: Any = None
    """The stream's own, if it has one."""
    first: str | None = None
    """A digest of the epoch's first sample, if one has been read."""
    ended: bool = False
    """Whether the epoch has no more: the stream's state may be that of its next beginning."""


class Part(NamedTuple):
    """A micro-batch of a stream, as it comes from the process that reads it."""

    worker: int
    batch: Any
    position: Any
    """Of the reader, behind it; from the rank's own process without the stream's state, which can
    be asked for."""
    resumed: str | None
    """`Reader.resumed`."""


class Reader:
    """One epoch of a stream from a position on: by the stream's state if it has one, or else by
    reading what comes before.

    The random generators are seeded for each `read`, so that a stream that draws from them is
    repeated after a resume.
    """

    def __init__(
        self, stream: Any, start: Position, chunk: int, seed: tuple[int, ...], in_worker: bool
    ):
        """`chunk`: how many samples are read at once. `seed`: of the generators, numbers >= 0."""
        self.epoch, self.samples, self.first = start.epoch, 0, start.first
        self.resumed: str | None = None
        """A digest of the epoch's first sample, if it was read again to reach the position."""
        self._stream, self._has_state = stream, has_state(stream)
        self._seed, self._in_worker = seed, in_worker
        with self._seeded():
            set_epoch(stream, self.epoch)
            if start.state is not None:
                stream.load_state_dict(start.state)
                self.samples = start.samples
            self._iterator: Iterator[Any] = iter(
                stream if hasattr(stream, "__iter__") else stream()
            )
        self._ended = start.ended
        if self._ended:
            self._iterator, self.samples = iter(()), start.samples
        while self.samples < start.samples:
            if not self.read(min(chunk, start.samples - self.samples)):
                raise CheckpointError(
                    f"cannot resume train_data within epoch {self.epoch}: {name_of(stream)} had "
                    f"read {start.samples} samples of it, but it now ends after {self.samples}"
                )
            self.resumed = self.first

    def _seeded(self) -> Any:
        words = *self._seed, self.epoch, self.samples
        if not self._in_worker:
            return seeded(*words)
        seed_host(*words)
        return nullcontext()

    def read(self, count: int) -> list[Any]:
        """The next samples; fewer, or none, at the epoch's end."""
        samples: list[Any] = []
        try:
            with self._seeded():
                while len(samples) < count:  # no `islice`: some begin again at each `iter`
                    samples.append(next(self._iterator))
        except StopIteration:
            self._ended = True
        except Exception as error:
            number = self.samples + len(samples)
            error.add_note(f"while reading sample {number} of epoch {self.epoch} of this reader")
            raise
        if samples and not self.samples:
            self.first = digest(samples[0])
        self.samples += len(samples)
        return samples

    def position(self, with_state: bool) -> Position:
        """Behind the last sample read; `with_state`: with the stream's own, if it has one."""
        state = self._stream.state_dict() if with_state and self._has_state else None
        return Position(self.epoch, self.samples, state, self.first, self._ended)

    def leave(self) -> None:
        """Ends an epoch that is known to be over: a stream with a state is given the chance to end
        its iterator, and to begin again; one that has more samples continues with these."""
        if not self._has_state or self._ended:
            return
        state = deepcopy(self._stream.state_dict())
        if self.read(1):
            self._stream.load_state_dict(state)


def takes_epoch(data: Any) -> bool:
    """Whether it can be told which epoch begins."""
    return hasattr(data, "set_epoch") or hasattr(data, "next_epoch")


def set_epoch(stream: Any, epoch: int) -> None:
    """Tells it which epoch begins, if it can be told."""
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(epoch)
    elif hasattr(stream, "next_epoch"):  # MosaicML's StreamingDataset
        stream.next_epoch = epoch


def check_resumed(stream: Any, start: Position, found: str | None) -> None:
    """Raises CheckpointError if a position was reached by reading an epoch again, but that began
    with another sample than before."""
    if found is None or start.first in (None, found):
        return
    raise CheckpointError(
        f"cannot resume train_data within epoch {start.epoch}: {name_of(stream)} has no "
        "state_dict, and the epoch now begins with another sample than before: make its order "
        "depend on the epoch alone (`set_epoch(epoch)`, a generator of its own), or give it "
        "state_dict and load_state_dict"
    )


def name_of(stream: Any) -> str:
    """What to call it in messages."""
    return getattr(stream, "__name__", type(stream).__name__)
