"""A model that counts how often each sample was trained on: SGD with rate 1 takes a sample's share
of the loss off its number."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness.config import Config
from harness.data.token_files import TokenFile, TokenWindows
from harness.task import Task
from tests.support.streams import Shuffled, Stateful

LENGTH = 60


class Counter(nn.Module):
    """`pause`: seconds that a forward takes at least."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.counts = nn.Parameter(torch.zeros(LENGTH))

    def forward(self, samples: Tensor) -> None:
        time.sleep(self.pause)
        self.loss = self.counts[samples].mean()


class Numbers(Dataset[int]):
    """The numbers from `first` on, of which some cannot be read."""

    def __init__(self, length: int = LENGTH, first: int = 0, bad: Sequence[int] = ()):
        self.length, self.first, self.bad = length, first, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise OSError(f"{index}.txt is damaged")
        return self.first + index


class Unequal(Shuffled):
    """Each rank has so many numbers."""

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        super().__init__(sum(sizes))
        self.start, self.stop = sum(sizes[:rank]), sum(sizes[: rank + 1])

    def share(self) -> list[int]:
        return super().share()[self.start : self.stop]


class UnequalLoader:
    """The same as a loader of batches of 2, with a state: each `iter` continues there."""

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        self.stream, self.at = Unequal(sizes, rank), 0

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in torch.tensor(self.stream.share()).split(2)[self.at :]:
            self.at += 1
            yield batch
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def windows(directory: str) -> TokenWindows:
    """A corpus of windows of 4 tokens, the first of which is the number of the window."""
    path = Path(directory) / "corpus.npy"
    if not path.exists():
        np.save(path, np.arange(LENGTH * 4 + 1, dtype=np.uint16) // 4)
    return TokenWindows(TokenFile(path), 4)


def first_tokens(samples: list[Tensor]) -> Tensor:
    return torch.stack([sample[0] for sample in samples])


def build(config: Config) -> Task:
    from harness.distributed import global_rank, world_size

    ranks = global_rank(), world_size()
    args: dict[str, Any] = config.task.args
    bad = args.get("bad", ())
    data: Any = {
        "map": lambda: Numbers(bad=bad),
        "mixture": lambda: {"a": Numbers(20), "b": Numbers(40, first=20, bad=bad)},
        "tokens": lambda: windows(args["directory"]),
        "stateful": lambda: Stateful(LENGTH),
        "stateless": lambda: Shuffled(LENGTH),
        "divided": lambda: Stateful(LENGTH, divided=True, ranks=ranks),
        "unequal": lambda: Unequal(args["sizes"], ranks[0]),
        "unequal_loader": lambda: UnequalLoader(args["sizes"], ranks[0]),
        "loader": lambda: DataLoader(Numbers(), 6),  # type: ignore[arg-type]
        "shuffling": lambda: DataLoader(Numbers(), 6, shuffle=True),  # type: ignore[arg-type]
    }[args["kind"]]()
    collate = first_tokens if args["kind"] == "tokens" else torch.tensor
    return Task(models={"net": Counter(args.get("pause", 0.0))}, train_data=data, collate=collate)
