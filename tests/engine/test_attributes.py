"""What a forward leaves in attributes of submodules."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.engine.attributes import Submodules
from harness.task import default_feeder
from harness.testing.pool import RankPool
from tests.support.small_loop import engines_of, train


def test_submodules_are_those_of_the_model_as_it_is_now() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Dropout())
    submodules = Submodules(model)

    def check() -> None:
        assert submodules() == list(model.named_modules())

    check()
    assert submodules() is submodules()
    model[1].append(nn.Linear(2, 2))
    check()
    model[1] = nn.Linear(2, 2)
    check()
    del model[0]  # renames the others, without a registration
    check()
    leaf = model[1]
    leaf.child = nn.Linear(2, 2)
    check()
    model[0].child = leaf._modules.pop("child")
    check()


def test_a_model_without_children() -> None:
    model: Any = nn.Linear(2, 2)
    model.loss = 3.0
    submodules = Submodules(model)
    assert submodules.gather("loss", str) == {}
    assert submodules.gather("loss", float) == {"": 3.0}
    assert submodules.gather("loss", float) == {}


class Block(nn.Module):
    """Its loss is one of training only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        if self.training:
            self.loss = hidden.square().mean()
            self.stats = {"size": hidden.detach().abs().mean()}
        return hidden.tanh()


class Recomputed(nn.Module):
    """The forward of the block runs once more in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(2, 2), Block()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> None:
        found = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        self.loss = found.square().mean()


def attributes_after_a_step(reentrant: bool, stage: int) -> tuple[set[str], list[str], set[str]]:
    """What is reported, what is left on the modules, and what an evaluation then reports."""
    engines = engines_of(Recomputed(reentrant), default_feeder, stage)
    (report,) = train(engines, [torch.ones(4, 2)])
    modules = engines["net"].module.modules()
    left = [name for m in modules for name in ("loss", "stats") if name in vars(m)]
    engines.eval()
    with torch.no_grad():
        _, stats = default_feeder(engines["net"], torch.ones(2, 2))
    engines.close()
    return set(report), left, set(stats)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("stage", [0, 3])
def test_what_a_backward_sets_again_is_not_taken_for_a_new_loss(
    two_ranks: RankPool, reentrant: bool, stage: int
) -> None:
    for reported, left, evaluated in two_ranks.run(attributes_after_a_step, reentrant, stage):
        assert {"loss.block", "size"} <= reported
        assert left == []
        assert evaluated == set()
