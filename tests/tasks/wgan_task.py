"""WGAN-GP on points: a critic D with a gradient penalty, and a generator G."""

from typing import Any

import torch
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task

PENALTY = 10.0


def feed(engine: Any, real: Tensor) -> tuple[Tensor, dict[str, Any]]:
    noise = torch.randn(len(real), 2)
    if engine.name == "G":
        with engine.peers.lend("D") as critic:
            return -critic(engine(noise)).mean(), {}
    with torch.no_grad(), engine.peers.lend("G") as generator:
        fake = generator(noise)
    mixed = torch.lerp(real, fake, torch.rand(len(real), 1)).requires_grad_()
    (slope,) = torch.autograd.grad(engine(mixed).sum(), mixed, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    return engine(fake).mean() - engine(real).mean() + PENALTY * penalty, {}


def build(config: Config) -> Task:
    models: dict[str, nn.Module] = {
        "D": nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1)
        ),
        "G": nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 6)),
    }
    points = torch.randn(96, 6, generator=torch.Generator().manual_seed(7)) * 0.5 + 1
    return Task(models=models, train_data=points, feeder=feed)
