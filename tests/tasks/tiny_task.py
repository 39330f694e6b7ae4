"""A task small enough for tests: one small classifier of fixed random points for each engine."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task

SAMPLES = 96


class Points(torch.utils.data.Dataset):
    """Fixed points of 6 numbers, and the class of each."""

    def __init__(self, samples: int, seed: int = 7):
        generator = torch.Generator().manual_seed(seed)
        self.points = torch.randn(samples, 6, generator=generator)
        self.classes = self.points[:, :3].argmax(1)
        self.lengths = [1 + index % 5 for index in range(samples)]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.classes[index]


class Classifier(nn.Module):
    """Leaves loss and stats on itself for the default feeder; has a buffer and tied weights."""

    def __init__(self, dropout: float = 0.0, width: int = 16):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.middle = nn.Linear(width, width, bias=False)
        self.again = nn.Linear(width, width, bias=False)
        self.again.weight = self.middle.weight
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, 3)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, points: Tensor, classes: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(points)))
        hidden = torch.tanh(self.again(torch.tanh(self.middle(hidden))) * self.scale.to(hidden))
        logits = self.last(hidden)
        self.loss = F.cross_entropy(logits.float(), classes)
        self.stats = {"accuracy": (logits.argmax(1) == classes).float().mean()}
        return logits


def build(config: Config) -> Task:
    args: dict[str, Any] = {"samples": SAMPLES, "eval_samples": 10, "dropout": 0.0, "width": 16}
    args |= config.task.args
    if args.get("raise"):
        raise RuntimeError("the task is unwell")
    models: Mapping[str, nn.Module] = {
        name: Classifier(args["dropout"], args["width"]) for name in config.engines
    }
    held_out = Points(args["eval_samples"], seed=8) if args["eval_samples"] else None
    return Task(
        models=models,
        train_data=Points(args["samples"]),
        eval_data=held_out,
        parameter_groups=args.get("parameter_groups", {}),
    )
