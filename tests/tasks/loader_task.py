"""The tiny task with a loader of its own, or with samples that each rank reads for itself."""

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from harness.config import Config
from harness.task import Task
from tests.tasks.tiny_task import Classifier, Points

SIZE = 4
"""Samples in a batch."""


def world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Loader:
    """This rank's batches in turn; every W-th batch is this rank's."""

    def __init__(self, samples: int):
        self.points = Points(samples)
        self.rank, self.ranks = world()

    def __len__(self) -> int:
        return len(self.points) // SIZE // self.ranks

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.start(), len(self)):
            first = (number * self.ranks + self.rank) * SIZE
            self.returned = number + 1
            yield default_collate([self.points[i] for i in range(first, first + SIZE)])
        self.returned = 0

    def start(self) -> int:
        return 0


class Stateful(Loader):
    """Its state is this rank's."""

    returned = 0

    def start(self) -> int:
        return self.returned

    def state_dict(self) -> dict[str, int]:
        return {"returned": self.returned, "rank": self.rank}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state["rank"] == self.rank
        self.returned = state["returned"] % len(self)


class Global(Loader):
    """Its state counts the batches of all ranks."""

    has_global_state = True
    returned = 0

    def start(self) -> int:
        return self.returned

    def state_dict(self) -> dict[str, int]:
        return {"returned": self.returned * self.ranks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.returned = state["returned"] // self.ranks % len(self)


class Streaming(IterableDataset):
    """Like MosaicML's StreamingDataset: items by index, but the length is this rank's."""

    def __init__(self, samples: int):
        self.points = Points(samples)
        self.rank, self.ranks = world()

    def __len__(self) -> int:
        return len(self.points) // self.ranks

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.points[i] for i in range(self.rank, len(self.points), self.ranks))


KINDS = {"plain": Loader, "stateful": Stateful, "global": Global, "streaming": Streaming}


def build(config: Config) -> Task:
    data = KINDS[config.task.args["kind"]](config.task.args.get("samples", 48))
    return Task(models={"net": Classifier()}, train_data=data)
