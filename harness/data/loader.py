"""This rank's micro-batches of a map-style dataset: endless, the same number on all ranks."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from harness.data.batched_sampler import BatchedOrderedSampler
from harness.data.fetch import Collate, Fetch, unchanged
from harness.data.mixture import MixtureSampler
from harness.data.sampler import Place, Sampler, Span
from harness.data.skipping import SkippingFetch, Skips
from harness.data.workers import end_workers, loader_options
from harness.errors import TaskError


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
        skips: Skips | None = None,
    ):
        """`skips`: counts samples that cannot be read, and are left out. None: it is an error."""
        self.sampler = sampler
        # Each draw of a batched sampler is a complete micro-batch.
        self._rounds = 1 if isinstance(sampler, BatchedOrderedSampler) else micro_batch_size
        self.skips = skips
        self._fetch = (
            Fetch(dataset, collate, seed)
            if skips is None
            else SkippingFetch(dataset, collate, seed, skips.most_in_a_row)
        )
        self._workers, self._start_method = workers, start_method
        self._returned = 0
        self._iterator: Iterator[Any] | None = None
        self._drawn: deque[list[int]] = deque()  # of the micro-batches that are being fetched
        self.samples: list[int] | None = None
        self.share = 1.0

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
        if self.skips is not None:
            batch, self.share, skipped, error = batch
            self.skips.add(self.samples, skipped)
            if error:
                raise TaskError(f"data.on_error = 'skip': {error}")
        return batch

    def check_ranks(self) -> None:
        """Nothing: the sampler divides the data."""

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
        if "sampler" not in state:
            raise ValueError("it was a loader or a stream, and is a map-style dataset")
        self.sampler.load_state_dict(state["sampler"])
        self._returned = state["given"]
        if self.skips is not None:
            self.skips.restart()
        self.close()

    def fit_state_dict(self, state: dict[str, Any]) -> str:
        """`Sampler.fit_state_dict`. Raises ValueError if it was no dataset."""
        if "sampler" not in state:
            self.load_state_dict(state)
        text = self.sampler.fit_state_dict(state["sampler"])
        self._returned = state["given"]
        self.close()
        return text

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
