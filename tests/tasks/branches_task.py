"""Models with layers that not every micro-batch uses."""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from harness.config import Config
from harness.metrics.meters import Stats
from harness.task import Task, default_feeder

WIDTH = 8


class Branches(nn.ModuleList):
    """Layers of which `kind` and the number of the last sample choose some."""

    def __init__(self, kind: str, reentrant: bool):
        widths = (WIDTH, 2 * WIDTH if "shapes" in kind else WIDTH)
        super().__init__(
            nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, WIDTH))
            for width in widths
        )
        self.kind = kind
        self.reentrant = reentrant

    def forward(self, hidden: Tensor, last: int) -> Tensor:
        for layer in self.chosen(last):
            if self.reentrant:
                hidden = hidden + checkpoint(layer, hidden, use_reentrant=True)
            else:
                hidden = hidden + layer(hidden)
        return hidden

    def chosen(self, last: int) -> list[nn.Module]:
        first, second = self
        match self.kind:
            case "experts" | "shapes":  # one of them
                return [self[last % 5 % 2]]
            case "sometimes":  # both, in every third micro-batch of 8 samples
                return [] if last // 8 % 3 else [first, second]
            case "late shapes":  # from the fourth micro-batch on
                return [self[last % 2 if last >= 3 * 8 else 0]]
            case "late skip":
                return [first, second] if last % 2 or last < 3 * 8 else [first]
            case "late death":
                if last >= 3 * 8 and last % 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return [first, second]
            case "order":
                return [first, second] if last % 2 else [second, first]
            case _:
                raise ValueError(self.kind)


class Classifier(nn.Module):
    """Of points; `number` [B] are the numbers of the samples. It has a layer that is never used."""

    def __init__(self, kind: str, reentrant: bool = False):
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.experts = Branches(kind, reentrant)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, points: Tensor, classes: Tensor, number: Tensor) -> None:
        hidden = self.experts(torch.tanh(self.first(points)), int(number.max()))
        self.loss = F.cross_entropy(self.last(hidden).float(), classes)


def points(count: int = 96) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(count, 6, generator=generator)
    return TensorDataset(samples, samples[:, :3].argmax(1), torch.arange(count))


class Experts(nn.Module):
    """The case `experts` of a public bug report: two experts of one shape, and hard routing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.e = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor, y: Tensor, i: Tensor) -> None:
        h = x.mean(1)
        h = h + self.e[int(i.max()) % 2](h)
        self.loss = F.mse_loss(self.b(torch.tanh(self.a(h))), y)


def routed_points(count: int = 128) -> Dataset:
    x = torch.randn(count, 5, 8, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, torch.sin(x.mean(1) * 3), torch.arange(count))


class Once(nn.Module):
    """A layer `extra` that only the first step uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> None:
        h = self.a(x)
        h = h if self.calls else h + self.extra(h)
        self.calls += 1
        self.loss = h.square().mean()


def once_points() -> Dataset:
    return TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Dataset]]] = {
    "case experts": (Experts, routed_points),
    "case once": (Once, once_points),
}


def feed_twice(engine: Any, batch: Any) -> tuple[Tensor, Stats]:
    """Back-propagates a loss, and returns another."""
    loss, stats = default_feeder(engine, batch)
    engine.backward(loss)
    return default_feeder(engine, batch)[0], stats


def feed_and_step(engine: Any, batch: Any) -> tuple[Tensor, Stats]:
    """Does by itself what harness does after it."""
    loss, stats = default_feeder(engine, batch)
    engine.backward(loss)
    engine.step()
    return loss, stats


def feed_module(engine: Any, batch: Any) -> tuple[Tensor, Stats]:
    """Calls the model without DeepSpeed's forward."""
    engine.module(*batch)
    return engine.module.__dict__.pop("loss"), {}


def feed_after_a_look(engine: Any, batch: Any) -> tuple[Tensor, Stats]:
    """Reads weights outside of the modules that have them, before the forward and after it."""
    norms = weight_norms(engine.module)
    loss, _ = default_feeder(engine, batch)
    assert weight_norms(engine.module) == norms
    return loss, {}


def weight_norms(module: nn.Module) -> list[float]:
    import deepspeed  # late: zero.startup patches it first

    parameters = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.norm().item() for parameter in parameters]


def feed_after_a_change(engine: Any, batch: Any) -> tuple[Tensor, Stats]:
    """Changes weights without `edit_weights`."""
    import deepspeed  # late: zero.startup patches it first

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        pass
    return default_feeder(engine, batch)


FEEDERS: dict[str, Any] = {
    "change": feed_after_a_change,
    "twice": feed_twice,
    "step": feed_and_step,
    "module": feed_module,
    "look": feed_after_a_look,
}


def build(config: Config) -> Task:
    args = dict(config.task.args)
    kind, feeder = args.pop("kind"), args.pop("feeder", None)
    model, data = CASES.get(kind, (lambda: Classifier(kind, **args), points))
    models = {name: model() for name in config.engines}
    return Task(models=models, train_data=data(), feeder=FEEDERS.get(feeder, default_feeder))
