"""Batches and outputs of every kind for the default feeder, with parameters of the model's own."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task
from tests.tasks.tiny_task import Points


@dataclass
class Batch:
    points: Tensor
    classes: Tensor
    note: str | None = None


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


Pair = namedtuple("Pair", "points classes")
BATCHES: dict[str, Any] = {
    "dict": lambda points, classes: {"points": points, "classes": classes, "note": None},
    "UserDict": lambda points, classes: UserDict(points=points, classes=classes, note="a"),
    "dataclass": lambda points, classes: Batch(points, classes, "a"),
    "namedtuple": Pair,
}
OUTPUTS: dict[str, Any] = {
    "dict": dict,
    "UserDict": UserDict,
    "dataclass": Output,
    "namedtuple": SimpleNamespace,
}


class Model(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.layer = nn.Linear(6, 3)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, points: Tensor, classes: Tensor, note: str | None = None) -> Any:
        logits = self.layer(points * self.scale) * 2 + self.bias
        loss = nn.functional.cross_entropy(logits, classes)
        return OUTPUTS[self.kind](loss=loss, logits=logits)


def build(config: Config) -> Task:
    kind = config.task.args["kind"]

    def collate(samples: list[tuple[Tensor, Tensor]]) -> Any:
        return BATCHES[kind](*torch.utils.data.default_collate(samples))

    return Task(
        models={"net": Model(kind)}, train_data=Points(48), eval_data=Points(6), collate=collate
    )
