"""Reentrant checkpointing of a module that is called twice gives each weight two gradients in one
backward: they are summed, or the run is refused; at no stage one of them is lost."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.errors import TaskError
from harness.testing.pool import RankPool
from tests.support.small_loop import BATCHES, SGD, engines_of, train, weights_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = torch.tanh(checkpoint(self.shared, x, use_reentrant=True))
        return F.mse_loss(x, torch.ones_like(x))


def feed(engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return engine(batch), {}


def trained(stage: int, overlap: bool, bucket: int) -> dict[str, Tensor] | str:
    """The weights, or the error."""
    zero = {"reduce_bucket_size": bucket, "overlap_comm": overlap} if stage else {}
    engines = engines_of(Net(), feed, stage, {"zero_optimization": zero}, optimizer=SGD)
    try:
        train(engines, BATCHES)
        return weights_of(engines)
    except TaskError as error:
        return str(error)
    finally:
        engines.close()


def trained_by_torch() -> dict[str, Tensor]:
    """In one process, without DeepSpeed."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for batch in BATCHES:
        optimizer.zero_grad()
        for part in batch.chunk(2):
            (net(part) / 2).backward()
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize("stage", [0, 1])
def test_both_gradients_are_summed(two_ranks: RankPool, stage: int) -> None:
    expected = trained_by_torch()
    for found in two_ranks.run(trained, stage, False, 1):
        assert isinstance(found, dict)
        for path, weight in expected.items():
            torch.testing.assert_close(found[path], weight, rtol=1e-5, atol=1e-6, msg=path)


@pytest.mark.parametrize("bucket", [1, 1_000_000])
@pytest.mark.parametrize(("stage", "overlap"), [(1, True), (2, False), (3, False), (3, True)])
def test_a_second_gradient_is_refused_by_name(
    two_ranks: RankPool, stage: int, overlap: bool, bucket: int
) -> None:
    for error in two_ranks.run(trained, stage, overlap, bucket):
        assert isinstance(error, str)
        # With overlap_comm at stage 1 DeepSpeed itself notices, and does not know which one.
        assert re.match(r"(a parameter|parameter shared\.\w+.*) got its gradient twice", error)
        assert "use_reentrant=False" in error
