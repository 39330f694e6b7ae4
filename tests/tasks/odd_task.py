"""The tiny task, with parameters that have no dimension or no element."""

import torch
from tiny_task import Classifier, Points
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task


class Scale(nn.Module):
    """`x * e^s`, as CLIP has it."""

    def __init__(self, start: float):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit_scale.exp()


class Empty(nn.Module):
    """Appends no features."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0, 6))
        self.nothing = nn.Parameter(torch.zeros(3, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x @ self.none.T], dim=-1) + self.nothing.sum()


class Odd(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.gain = Scale(0.5)
        self.extra = Empty()
        self.shift = nn.Parameter(torch.tensor(0.25))

    def forward(self, points: Tensor, classes: Tensor) -> Tensor:
        points = self.gain(self.extra(points)) + self.shift
        return super().forward(points, classes)


def build(config: Config) -> Task:
    samples = Points(96)
    return Task(models={"net": Odd()}, train_data=samples, eval_data=Points(10, seed=8))
