"""A net with dropout, BatchNorm and a buffer that is not saved, and ways to break its steps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import distributed
from harness.config import Config
from harness.task import Stats, Task

SAMPLES = 96


class Points(torch.utils.data.Dataset):
    """Points of 6 numbers, their classes, and their numbers. `bad`: samples of NaN; `without`:
    samples that are not in the data."""

    def __init__(self, bad: list[int], without: list[int]):
        generator = torch.Generator().manual_seed(7)
        self.points = torch.randn(SAMPLES, 6, generator=generator)
        self.classes = self.points[:, :3].argmax(1)
        self.points[bad] = torch.nan
        self.numbers = [number for number in range(SAMPLES) if number not in without]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        number = self.numbers[index]
        return self.points[number], self.classes[number], number


class Net(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.dropout, self.last = nn.Dropout(0.2), nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(points)))
        if self.training:
            self.calls += hidden.detach().abs().mean()
        return self.last(self.dropout(hidden) * (1 + self.calls / 100))


class Broken(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


def build(config: Config) -> Task:
    """Args: `steps` of the run, in which on rank `rank` (None: all) and in engine `engine` the loss
    is multiplied by `factor`, or with "gradient" its gradient is NaN, or with
    "layer" the output of a layer; `bad` and `without`: see
    Points; `kind`: "weigh", with weights of the micro-batches, or "loader", its own;
    `once`: not again after a rollback."""
    args: dict[str, Any] = {"steps": [], "rank": 1, "factor": "nan", "engine": "net"}
    args |= {"bad": [], "without": [], "kind": "", "once": False} | config.task.args
    fired: set[int] = set()

    def feed(engine: Any, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Stats]:
        points, classes, _ = batch
        step = engine.counters.global_step + 1
        is_due = step in args["steps"] and torch.is_grad_enabled() and engine.name == args["engine"]
        is_broken = is_due and args["rank"] in (None, distributed.global_rank())
        is_broken = is_broken and not (args["once"] and step in fired)
        if is_due:
            fired.add(step)
        engine.module.norm.eps = torch.nan if is_broken and args["factor"] == "layer" else 1e-5
        logits = engine(points.to(engine.dtype))
        if is_broken and args["factor"] == "gradient":
            logits = Broken.apply(logits)
        loss = F.cross_entropy(logits.float(), classes)
        if is_broken and args["factor"] not in ("gradient", "layer"):
            loss = loss * float(args["factor"])
        return loss, {}

    data: Any = Points(args["bad"], args["without"])
    if args["kind"] == "loader":
        ranks, rank = distributed.world_size(), distributed.global_rank()
        shares = torch.utils.data.DistributedSampler(data, ranks, rank)
        data = torch.utils.data.DataLoader(data, batch_size=4, sampler=shares)
    return Task(
        models={name: Net() for name in config.engines},
        train_data=data,
        weigh=(lambda batch: float(len(batch[0]))) if args["kind"] == "weigh" else None,
        eval_data=Points([], list(range(80))),
        feeder=feed,
    )
