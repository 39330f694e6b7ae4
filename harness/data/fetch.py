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
        if get_worker_info() is not None:
            seed_host(self.seed, number)
        index: int | None = None
        try:
            samples = []
            for index in indices:
                samples.append(self.dataset[index])
            index = None
            return self.collate(samples)
        except Exception as error:
            what = "collating" if index is None else f"reading sample {index} of"
            error.add_note(f"while {what} the samples {first_few(indices, MOST_SAMPLES)}")
            raise


def unchanged(batch: Any) -> Any:
    """The batch: what `Fetch` returns is collated."""
    return batch


class CountingCollate:
    """Collates samples into a `Counted`; workers may unpickle it."""

    def __init__(self, collate: Collate):
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Counted:
        return len(samples), self.collate(samples)
