"""A small model that `task.args` changes between a save and a resume: layers are added, removed and
resized, the data grows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task


class Notes(torch.utils.data.Dataset):
    """Fixed points of 6 numbers; each index that is read is appended to a file."""

    def __init__(self, samples: int, path: Path | None):
        self.points = torch.randn(512, 6, generator=torch.Generator().manual_seed(7))
        self.samples, self.path = samples, path

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(f"{index}\n")
        return self.points[index], self.points[index, :3].argmax()

    @property
    def lengths(self) -> list[int]:
        return [1 + index % 5 for index in range(self.samples)]


class Layers(nn.Module):
    """Linear layers, a buffer that counts the forwards, and a head."""

    def __init__(self, layers: int, hidden: int, classes: int):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.register_buffer("calls", torch.zeros(1))
        self.hidden = nn.Linear(8, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, points: Tensor, classes: Tensor) -> Tensor:
        x = torch.tanh(self.first(points))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        if self.training:
            self.calls += 1
        x = self.head(torch.tanh(self.hidden(x)))
        self.loss = F.cross_entropy(x.float(), classes)
        return x


class Events:
    """Appends events to a file."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        if "event" in record:
            with self.path.open("a") as file:
                file.write(f"{record['event']} at step {record['step']}: {record['text']}\n\n")

    def close(self) -> None:
        pass


def build(config: Config) -> Task:
    args: dict[str, Any] = {"layers": 1, "hidden": 8, "classes": 3, "samples": 96}
    args |= {"notes": None, "events": None} | config.task.args
    model = Layers(args["layers"], args["hidden"], args["classes"])
    notes = Path(args["notes"]) if args["notes"] else None
    sinks = [Events(Path(args["events"]))] if args["events"] else []
    return Task(models={"net": model}, train_data=Notes(args["samples"], notes), sinks=sinks)
