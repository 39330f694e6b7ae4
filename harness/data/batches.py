"""What a step's micro-batches are taken from: a loader of harness, or of the task."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from harness.data.sampler import Place, Span
from harness.data.skipping import Skips


class Batches(Protocol):
    """An endless iterator of micro-batches whose position can be saved."""

    @property
    def epoch(self) -> int:
        """Completed passes over the data."""
        ...

    @property
    def samples(self) -> list[int] | None:
        """The indices of the samples in the last micro-batch, if they are known."""
        ...

    @property
    def share(self) -> float:
        """How much the last micro-batch counts: 1; less, if samples of it could not be read; 0, if
        it only keeps this rank in step with the others."""
        ...

    @property
    def skips(self) -> Skips | None:
        """The samples that were left out, as they could not be read. None: that is an error."""
        ...

    def __next__(self) -> Any: ...

    def check_ranks(self) -> None:
        """Before the first step: raises TaskError, on all ranks, if the ranks do not divide the
        data among themselves. Collective."""
        ...

    def close(self) -> None:
        """Ends the worker processes."""
        ...

    def passes(self) -> dict[str, float]:
        """How often each source of a mixture has been gone through; else nothing."""
        ...

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Other weights of a mixture's sources, from the current position on."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def quick_state_dict(self) -> dict[str, Any] | None:
        """`state_dict`, if that is quick enough for every step; else None."""
        ...

    @property
    def place(self) -> Place:
        """Where the next micro-batches begin; the same on all ranks."""
        ...

    @property
    def dropped(self) -> list[Span]:
        """What is never returned, as `drop` was called."""
        ...

    def spans(self, start: Place, stop: Place) -> list[Span]:
        """What lies between two places."""
        ...

    def samples_in(
        self, spans: Sequence[Span], rank: int | None = None, number: int | None = None
    ) -> list[Any]:
        """The indices of the samples of all ranks in some spans, in order, or those of one rank's
        micro-batch `number`; empty if unknown."""
        ...

    def drop(self, spans: Sequence[Span]) -> None:
        """Never returns what is in these spans. Called at a place before them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position, to which the number of ranks that saved it is added as
        `world_size`. Raises ValueError or CheckpointError if it does not fit."""
        ...

    def fit_state_dict(self, state: dict[str, Any]) -> str:
        """As `load_state_dict`, or as near as other data allows. Returns what becomes of the epoch
        in progress; "" if it simply continues. Collective. Raises as `load_state_dict` does
        if there is no such place."""
        ...


class WithoutSources:
    """Of batches that are not a mixture."""

    def passes(self) -> dict[str, float]:
        """Nothing: only a mixture has sources."""
        return {}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Never called."""
        raise AssertionError
