"""A small model of repeated blocks, and the results of its steps, for the tests of offloading."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WIDTH = 16


class Block(nn.Module):
    """Dropout, a keyword argument, and an input that is used twice."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, *, shift: Tensor | None = None) -> Tensor:
        y = self.dropout(torch.tanh(self.linear(x)))
        return x + (y if shift is None else y * shift)


class Model(nn.Module):
    """Blocks one after another."""

    def __init__(self, blocks: int = 6, width: int = WIDTH):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shift=x.sigmoid())
        return x


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of the gradients."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def step(model: nn.Module, seed: int = 1, rows: int = 8) -> list[Tensor]:
    """Loss, gradients and the state of the random generator after a forward and a backward."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(torch.randn(rows, WIDTH)).square().sum()
    loss.backward()
    return [loss.detach(), *gradients(model), torch.get_rng_state()]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether both are equal to the bit."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: tensors as small as these gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
