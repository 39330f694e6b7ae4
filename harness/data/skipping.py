"""Samples that cannot be read: micro-batches without them, and how many there were."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from harness.data.fetch import Collate, Fetch
from harness.data.mixture import Mixture
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
    error: str = ""
    """Why there is no batch."""


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
        if not samples:
            other = self._another(indices[-1])
            if isinstance(other, Skipped):
                after = f"nor one of the {self.most_skipped} after it; the last is {other.text}"
                why = f"no sample of a micro-batch can be read, {after}"
                return Fetched(None, 0.0, skipped, why)
            samples = [other]
        share = (len(indices) - len(skipped)) / len(indices)
        return Fetched(self.collated(samples, indices), share, skipped)

    def _read(self, index: int) -> Any:
        """A sample, or why it is skipped."""
        try:
            return self.dataset[index]
        except Exception as error:
            what = f"sample {index}"
            if isinstance(self.dataset, Mixture):
                source, item = self.dataset.locate(index)
                what += f" (item {item} of {source!r})"
            return Skipped(index, f"{what}: {type(error).__name__}: {error}")

    def _another(self, index: int) -> Any:
        """A sample to keep the rank in step with the others: the first readable one after, or why
        the last that was tried is skipped, too."""
        found = self._read((index + 1) % len(self.dataset))
        for further in range(2, self.most_skipped + 1):
            if not isinstance(found, Skipped):
                break
            found = self._read((index + further) % len(self.dataset))
        return found


class Skips:
    """The samples that one rank has skipped."""

    def __init__(self, most_in_a_row: int):
        self.most_in_a_row = most_in_a_row
        self._in_a_row = 0
        self.count = 0
        """Of the last micro-batch."""

    def add(self, indices: Sequence[int], skipped: Sequence[Skipped]) -> None:
        """Counts those of a micro-batch, of all its samples, and logs them. Raises TaskError, on
        this rank only, if they are one too many in a row."""
        for sample in skipped:
            log.warning("skipped %s", sample.text)
        bad = {one.sample: one.text for one in skipped}
        self.count = len(skipped)
        for index in indices:
            self._in_a_row = self._in_a_row + 1 if index in bad else 0
            if self._in_a_row > self.most_in_a_row:
                raise TaskError(
                    f"data.most_skipped = {self.most_in_a_row}: more samples in a row could not be "
                    f"read; the last is {bad[index]}"
                )

    def restart(self) -> None:
        """What follows is at another position: it is not in a row with what came before."""
        self._in_a_row = 0
