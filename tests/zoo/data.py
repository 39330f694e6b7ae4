"""Micro-batches, random and reproducible: by number and rank, whatever the layout."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from tests.zoo.entry import STEPS, Entry, Layout

SAMPLES = 4
"""Of a micro-batch."""
WORDS = 11
"""Size of the vocabulary."""


def micro_batch(entry: Entry, number: int, rank: int) -> Any:
    """A rank's micro-batch of that number."""
    return entry.batch(torch.Generator().manual_seed(1000 * number + rank), number)


class Batches:
    """One rank's loader of a run."""

    def __init__(self, entry: Entry, layout: Layout, rank: int):
        self.entry, self.rank = entry, rank
        self.count = STEPS * layout.accumulation

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (micro_batch(self.entry, number, self.rank) for number in range(self.count))


def vectors(generator: Generator, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [4, 8] each."""
    x = torch.randn(SAMPLES, 8, generator=generator)
    return x, torch.sin(3 * x)


def numbered(generator: Generator, number: int) -> tuple[Tensor, Tensor, int]:
    """`vectors` and the number of the micro-batch."""
    return *vectors(generator, number), number


def classes(generator: Generator, number: int) -> tuple[Tensor, Tensor]:
    """Inputs [4, 8], and classes from 0 to 7, [4]."""
    x = torch.randn(SAMPLES, 8, generator=generator)
    return x, x.argmax(1)


def sequences(generator: Generator, number: int) -> tuple[Tensor, Tensor]:
    """Sequences [4, 5, 8], and a target [4, 8] for each."""
    x = torch.randn(SAMPLES, 5, 8, generator=generator)
    return x, torch.sin(3 * x.mean(1))


def tokens(generator: Generator, number: int) -> tuple[Tensor]:
    """Words, [4, 6], whose successors can be learned."""
    first = torch.randint(WORDS, (SAMPLES, 1), generator=generator)
    return ((first + 3 * torch.arange(6)) % WORDS,)


def images(generator: Generator, number: int) -> tuple[Tensor, Tensor]:
    """Images [4, 3, 8, 8], and classes from 0 to 2, [4]."""
    x = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
    return x, x.mean((2, 3)).argmax(1)
