"""Samples that cannot be read: micro-batches without them, and how many there were."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from harness.data.fetch import Collate, Fetch
from harness.errors import TaskError

log = logging.getLogger(__name__)


class Skipped(NamedTuple):
    """A sample that could not be read."""

    sample: int
    """Its index."""
    text: str
    """Which it is, and why."""


class Fetched(NamedTuple):
    """A micro-batch without the samples that could not be read."""

    batch: Any
    share: float
    """How much of the micro-batch it is; 0: nothing, and it is of another sample."""
    skipped: list[Skipped]


class SkippingFetch(Fetch):
    """A dataset of `Fetched` micro-batches, without the samples whose `__getitem__` raises."""

    def __init__(self, dataset: Any, collate: Collate, seed: int, most_skipped: int):
        """`most_skipped`: after how many in a row to give up."""
        super().__init__(dataset, collate, seed)
        self.most_skipped = most_skipped

    def __getitem__(self, batch: tuple[int, list[int]]) -> Fetched:
        number, indices = batch
        self.seed_worker(number)
        read = {place: self._read(index) for place, index in enumerate(indices)}
        samples = [sample for sample in read.values() if not isinstance(sample, Skipped)]
        skipped = [sample for sample in read.values() if isinstance(sample, Skipped)]
        share = len(samples) / len(indices)
        return Fetched(
            self.collated(samples or [self._another(indices[-1])], indices), share, skipped
        )

    def _read(self, index: int) -> Any:
        """A sample, or why it is skipped."""
        try:
            return self.dataset[index]
        except Exception as error:
            what = f"sample {index}"
            if hasattr(self.dataset, "locate"):  # a mixture
                source, item = self.dataset.locate(index)
                what += f" (item {item} of {source!r})"
            return Skipped(index, f"{what}: {type(error).__name__}: {error}")

    def _another(self, index: int) -> Any:
        """A sample to keep the rank in step with the others: the first readable one after."""
        for further in range(1, self.most_skipped + 1):
            found = self._read((index + further) % len(self.dataset))
            if not isinstance(found, Skipped):
                return found
        raise TaskError(
            "data.on_error = 'skip': there is no sample to be read instead: the samples from "
            f"{index} to {index + self.most_skipped} cannot be read, either"
        )


class Skips:
    """The samples that one rank has skipped."""

    def __init__(self, most_in_a_row: int):
        self.most_in_a_row = most_in_a_row
        self._in_a_row = 0
        self.count = 0
        """Of the last micro-batch."""
        self.too_many = False
        """Whether it was one too many in a row."""

    def add(self, indices: Sequence[int], skipped: Sequence[Skipped]) -> None:
        """Counts those of a micro-batch, of all its samples, and logs them."""
        bad = {one.sample for one in skipped}
        self.count, self.too_many = len(skipped), False
        for index in indices:
            self._in_a_row = self._in_a_row + 1 if index in bad else 0
            self.too_many |= self._in_a_row > self.most_in_a_row
        for sample in skipped:
            log.warning("skipped %s", sample.text)
