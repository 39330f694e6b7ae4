"""A task with a sample that cannot be read, for tests of data-loader workers."""

import torch
from torch import nn

from harness.config import Config
from harness.task import Task


class Points(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 50:
            raise ValueError("sample 50 cannot be read")
        return torch.ones(2), torch.ones(1)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.loss = nn.functional.mse_loss(self.net(x), y)


def build(config: Config) -> Task:
    return Task(models={"net": Line()}, train_data=Points())
