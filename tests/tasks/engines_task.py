"""Two engines, the loss of one through the other, correctly or in a way that is refused."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.config import Config
from harness.task import Stats, Task
from tests.tasks.tiny_task import Points


class Reentrant(nn.Module):
    """Two layers that torch's older, reentrant checkpointing recomputes in the backward."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width))
        self.last = nn.Linear(width, outputs)

    def forward(self, points: Tensor) -> Tensor:
        if not points.requires_grad:  # else reentrant checkpointing gives no gradients
            points = points.detach().requires_grad_()
        hidden = checkpoint(self.inner, points, use_reentrant=True)
        return self.last(torch.tanh(hidden))


def build(config: Config) -> Task:
    """Engine "G" moves points, engine "D" scores them. `way`: how G's loss uses D."""
    way = config.task.args.get("way", "lend")
    kind = Reentrant if config.task.args.get("reentrant") else _layers
    loaned: list[Any] = []

    def feed(engine: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Stats]:
        points = batch[0].to(engine.dtype)
        if engine.name == "D":
            with torch.no_grad(), engine.peers.lend("G") as generator:
                moved = generator(points)
            right, wrong = engine(torch.cat([points, moved])).float().chunk(2)
            return (wrong - right).mean() + right.square().mean(), {}
        moved = engine(points)
        match way:
            case "after the loan" if loaned:
                score = loaned[0](moved)
            case "lend" | "after the loan":
                with engine.peers.lend("D") as module:
                    loaned[:] = [module]
                    score = module(moved)
            case "lend twice":  # the last time as for feature matching
                with engine.peers.lend("D") as module:
                    score = module(moved) + module(2 * moved)
                    with torch.no_grad():
                        right = module(points)
                    score = score - right
            case "lend a part":
                with engine.peers.lend("D") as module:
                    score = module[-1](module[:-1](moved))
            case "engine":
                score = engine.peers["D"](moved)
            case "engine, lent":
                with engine.peers.lend("D"):
                    score = engine.peers["D"](moved)
            case "module":
                score = engine.peers["D"].module(moved)
            case "part of the module":
                score = engine.peers["D"].module[:-1](moved)
            case "backward":
                with engine.peers.lend("D") as module:
                    score = module(moved)
                engine.peers["D"].backward(score.mean())
            case "itself":
                with engine.peers.lend("G") as module:
                    score = module(moved)
            case _:
                with engine.peers.lend(way) as module:
                    score = module(moved)
        return -score.float().mean() + (moved - points).square().mean(), {}

    models: dict[str, Any] = {"D": kind(16, 1), "G": kind(16, 6)}
    if config.task.args.get("shared"):
        models["G"][0] = models["D"][0]
    return Task(models=models, train_data=Points(96), eval_data=Points(10, seed=8), feeder=feed)


def _layers(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs))
