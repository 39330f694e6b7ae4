"""Muon's losses in a bug report: DeepSpeed divided its updates by their norm."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.helpers import Pools
from tests.support.small_loop import engines_of

LOSSES = [0.5322, 0.5535, 0.5595, 0.4676, 0.5995, 0.4992, 0.5466, 0.5639]
"""At 16 samples a step, of Keller Jordan's Muon in plain PyTorch."""


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(
        nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)
    )
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return net


def feed(engine: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    return nn.functional.mse_loss(engine(batch[0]), batch[1]), {}


def losses(stage: int) -> list[float]:
    optimizer = {"name": "muon", "lr": 0.02, "adam_lr": 1e-2, "weight_decay": 0.0}
    engines = engines_of(model(), feed, stage, {"gradient_clipping": 1.0}, optimizer=optimizer)
    engines.train()
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(2))
    batches = zip(x.split(16), torch.sin(x[:, :8] * 3).split(16), strict=True)
    found = [float(engines.step(next(batches))["loss"]) for _ in LOSSES]
    engines.close()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_with_clipping(pools: Pools, stage: int) -> None:
    assert pools(1).run(losses, stage)[0] == pytest.approx(LOSSES, abs=1e-4)
