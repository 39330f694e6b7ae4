"""From indices or samples to a batch, in the rank's process or in a worker's."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from harness.distributed.rng import seed_host
from harness.errors import first_few

Collate = Callable[[list[Any]], Any]
Counted = tuple[int, Any]
"""`(number of samples, batch)`."""

MOST_SAMPLES = 64
"""How many indices of samples an error's note contains."""


class Fetch(Dataset):
    """A dataset of micro-batches: indexing with `(number, indices)` loads and collates one."""

    def __init__(self, dataset: Any, collate: Collate, seed: int):
        self.dataset, self.collate, self.seed = dataset, collate, seed

    def __getitem__(self, batch: tuple[int, list[int]]) -> Any:
        number, indices = batch
        self.seed_worker(number)
        samples, index = [], None
        try:
            for index in indices:
                samples.append(self.dataset[index])
        except Exception as error:
            _note(error, f"reading sample {index} of", indices)
            raise
        return self.collated(samples, indices)

    def seed_worker(self, number: int) -> None:
        """Seeds the random generators for a micro-batch, if this is a worker."""
        if get_worker_info() is not None:
            seed_host(self.seed, number)

    def collated(self, samples: list[Any], indices: list[int]) -> Any:
        """The batch of some samples, of all that have these indices."""
        try:
            return self.collate(samples)
        except Exception as error:
            _note(error, "collating", indices)
            raise


def _note(error: Exception, what: str, indices: list[int]) -> None:
    """Adds to an error what was being done."""
    error.add_note(f"while {what} the samples {first_few(indices, MOST_SAMPLES)}")


def unchanged(batch: Any) -> Any:
    """The batch: what `Fetch` returns is collated."""
    return batch


class CountingCollate:
    """Collates samples into a `Counted`; workers may unpickle it."""

    def __init__(self, collate: Collate):
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Counted:
        return len(samples), self.collate(samples)
