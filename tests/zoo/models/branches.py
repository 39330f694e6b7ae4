"""Models that do not use all of their parameters in every step, or on every rank."""

import torch
from torch import Tensor, nn

from tests.zoo.data import numbered, vectors
from tests.zoo.entry import entry
from tests.zoo.models.basics import Mlp, mse

ZEROS = {"net": {"unused_parameters": "zeros"}}


@entry(vectors)
class NeverUsed(Mlp):
    """A layer that no forward calls: its weights only decay."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(8, 8)


@entry(numbered)
class SometimesUsed(Mlp):
    """A branch that is taken in every third micro-batch, on all ranks alike."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor, number: int) -> Tensor:  # type: ignore[override]
        return super().forward(x + self.extra(x) if number % 3 == 0 else x, y)


@entry(numbered)
class OneOfTwoBranches(Mlp):
    """In every micro-batch one of two branches, on all ranks alike."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor, number: int) -> Tensor:  # type: ignore[override]
        branch = self.odd if number % 2 else self.even
        return super().forward(torch.tanh(branch(x)), y)


@entry(numbered)
class LayerDrop(nn.Module):
    """Skips a layer at random (Fan et al. 2020), on all ranks alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        x = self.layers[0](x)
        draws = torch.rand(3, generator=torch.Generator().manual_seed(number))
        for layer, draw in zip(self.layers[1:], draws, strict=True):
            if draw > 0.4:
                x = x + torch.tanh(layer(x))
        return mse(x, y)


@entry(vectors, engines=ZEROS)
class ExpertsByRank(Mlp):
    """The data choose an expert: other ranks use other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        number = int(x.float().abs().sum() * 10) % len(self.experts)
        return super().forward(x + self.experts[number](x), y)


@entry(vectors, engines=ZEROS)
class UnequalExpertsByRank(Mlp):
    """Experts of other sizes, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8))
        self.wide = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        chosen = (self.narrow, self.wide) if x.float().mean() > 0 else (self.wide, self.narrow)
        return super().forward(x + chosen[1](chosen[0](x)), y)
