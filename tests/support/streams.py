"""Streams of samples: numbers in an order of their own in every epoch, of various kinds."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from harness.data.sampler import epoch_generator


def order_of(epoch: int, length: int) -> list[int]:
    return torch.randperm(length, generator=epoch_generator(7, epoch)).tolist()


class Shuffled(IterableDataset):
    """The numbers below `length`, in each epoch in another order; no length, no state. With
    `divided`, other ones on each rank and in each worker."""

    def __init__(self, length: int, divided: bool = False, ranks: tuple[int, int] | None = None):
        self.numbers, self.divided, self.ranks, self.epoch = length, divided, ranks, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def share(self) -> list[int]:
        order = order_of(self.epoch, self.numbers)
        if not self.divided:
            return order
        rank, ranks = self.ranks or (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return order[rank::ranks][worker::workers]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.share())


class Stateful(Shuffled):
    """With a state, as Hugging Face's streams have; it cannot be read again from the start."""

    read = 0
    reads = 0
    """All that were read by this object."""

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.read = state["epoch"], state["read"]

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.read = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        for number in self.share()[self.read :]:
            self.read += 1
            self.reads += 1
            yield number
        self.read = 0
