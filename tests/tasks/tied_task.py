"""Models with several names for one tensor: drawn by `seed`, or without one a block used thrice."""

import torch
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task
from tests.support.tied_models import model
from tests.tasks.tiny_task import Points


class Counted(nn.Linear):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(input)


class Thrice(nn.Module):
    """One block, registered three times."""

    def __init__(self) -> None:
        super().__init__()
        block = Counted()
        self.blocks = nn.ModuleList([block] * 3)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x).float().square().mean()


class Drawn(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = model(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mean())


class Learner(nn.Module):
    """Leaves its loss on itself for the default feeder."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, points: Tensor, _: Tensor) -> None:
        self.loss = self.inner(points)


def build(config: Config) -> Task:
    seed = config.task.args.get("seed")
    inner = Thrice() if seed is None else Drawn(seed)
    return Task(models={"net": Learner(inner)}, train_data=Points(96))
