"""The tiny task with an irregular layout: frozen parameters, odd sizes, two parameter groups."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from harness import distributed
from harness.config import Config
from harness.task import Task
from tests.tasks.tiny_task import SAMPLES, Classifier, Points


class Odd(Classifier):
    """A classifier with a parameter of odd size, and frozen ones, which are filled with `fill`."""

    def __init__(self, fill: float):
        super().__init__()
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        for parameter in self.frozen.parameters():
            parameter.data.fill_(fill)
        self.tilt = nn.Parameter(torch.ones(7))

    def forward(self, points: Tensor, classes: Tensor) -> Tensor:
        return super().forward(points * self.tilt[:6], classes)


class Counting(nn.Module):
    """Counts its calls in its extra state, a tensor or a table."""

    def __init__(self, as_tensor: bool):
        super().__init__()
        self.calls = 0
        self.as_tensor = as_tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x

    def get_extra_state(self) -> Any:
        return torch.tensor(float(self.calls)) if self.as_tensor else {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = int(state if self.as_tensor else state["calls"])


class TwoGroups(torch.optim.AdamW):
    """Decays the matrices alone, and steps the vectors half as far."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float):
        given = list(params)
        matrices = {"params": [p for p in given if p.dim() > 1], "weight_decay": weight_decay}
        vectors = {"params": [p for p in given if p.dim() < 2], "weight_decay": 0.0, "lr": lr / 2}
        super().__init__([matrices, vectors], lr=lr)


class Logged(Points):
    """Appends the index of every sample that a rank reads to a file."""

    def __init__(self, path: Path):
        super().__init__(SAMPLES)
        self.path = path

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with self.path.open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


def build(config: Config) -> Task:
    args: dict[str, Any] = {"fill": 0.0, "notes": None, "reordered": False, "born_sharded": False}
    args |= {"counts": False}
    args |= config.task.args
    ds = config.engines["net"].deepspeed() | {"train_micro_batch_size_per_gpu": 1}
    with deepspeed.zero.Init(config_dict_or_path=ds, enabled=args["born_sharded"]):
        models: dict[str, nn.Module] = {name: Odd(args["fill"]) for name in config.engines}
    if args["counts"]:
        models["net"].dropout = nn.Sequential(Counting(True), Counting(False))
    for parameter in models["wise"].parameters() if "wise" in models else []:
        parameter.data.fill_(args["fill"])
    if args["reordered"]:
        modules = models["net"]._modules
        modules["first"] = modules.pop("first")
    data = Points(SAMPLES)
    if args["notes"]:
        data = Logged(Path(args["notes"]) / f"rank-{distributed.global_rank()}.txt")
    return Task(models=models, train_data=data)
