"""Weights and buffers in unusual forms, or used outside of the modules that have them."""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.data import images, vectors
from tests.zoo.entry import call, entry
from tests.zoo.models.basics import GradientInTheLoss, Mlp, mse
from tests.zoo.models.branches import ZEROS, ExpertsByRank
from tests.zoo.models.training import edit_and_feed


@entry(images, bf16=0.1)
class ChannelsLast(nn.Module):
    """Its weights are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3)
        weight = self.first.weight
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(memory_format=torch.channels_last)))
        return F.cross_entropy(self.last(hidden.mean((2, 3))).float(), kind)


@entry(vectors)
class SparseBuffer(Mlp):
    """The edges of a graph."""

    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", (torch.rand(8, 8) < 0.3).float().to_sparse(), False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        neighbours = torch.sparse.mm(self.edges, x.float().T).T
        return super().forward(x + neighbours.to(x.dtype), y)


def follow_and_feed(engine: Any, batch: Any) -> Any:
    """Lets the teacher follow the student before every step, once on all ranks."""
    number = engine.counters.micro_step
    if number % engine.gradient_accumulation == 0 and engine.module.followed_at != number:
        engine.module.followed_at = number
        with engine.edit_weights() as model, torch.no_grad():
            pairs = zip(model.teacher.parameters(), model.student.parameters(), strict=True)
            for own, students in pairs:
                own.lerp_(students, 0.5)
    return call(engine, batch)


@entry(vectors, feeder=follow_and_feed)
class MomentumTeacher(nn.Module):
    """A copy of the student that follows it slowly (BYOL, MoCo, mean teachers, target networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(8, 8)
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.followed_at = -1

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.student(x), self.teacher(y).detach()) + mse(self.student(x), y)


@entry(vectors, engines=ZEROS, feeder=edit_and_feed)
class EditedExpertsByRank(ExpertsByRank):
    pass


def feed_with_decay(engine: Any, batch: Any) -> Any:
    """Adds a penalty on all weights."""
    loss, stats = call(engine, batch)
    return loss + 0.1 * sum(p.float().square().sum() for p in engine.module.parameters()), stats


@entry(vectors, engines=ZEROS, feeder=feed_with_decay)
class PenaltyOnAllWeights(Mlp):
    """Reads weights outside the modules that have them."""


@entry(vectors, engines=ZEROS)
class GradientInTheLossGathered(GradientInTheLoss):
    """Trains at ZeRO 3 as well, since all weights stay gathered."""
