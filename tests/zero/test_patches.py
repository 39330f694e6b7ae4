"""What DeepSpeed does differently from stage to stage, and does not any more."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing.pool import RankPool
from harness.zero.engine_state import base_optimizer
from tests.support.small_loop import engines_of, train, weights_of

BF16 = {"bf16": {"enabled": True}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "torch.optim:SGD": {"momentum": 0.9},
    "torch.optim:Adagrad": {"initial_accumulator_value": 0.1},
    "torch.optim:NAdam": {},
    "apollo": {"rank": 2},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def feed(engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return engine(batch.to(engine.dtype)).float().square().mean(), {}


def states_of(name: str, stage: int, ds: dict[str, Any]) -> tuple[Any, Any, list[Tensor]]:
    """The numbers in an optimizer's state when it has been built and after a step, and masters."""
    optimizer = {"name": name, "lr": 1e-2, "weight_decay": 0.1, **OPTIMIZERS[name]}
    engines = engines_of(model(), feed, stage, ds, optimizer=optimizer)
    base = base_optimizer(engines["net"].ds)
    masters = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    def numbers() -> list[dict[str, float]]:
        return [
            {k: float(torch.as_tensor(v).sum()) for k, v in state.items()}
            for state in base.state.values()
        ]

    built = numbers()
    train(engines, [torch.ones(4, 6)])
    stepped = numbers()
    engines.close()
    return built, stepped, masters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_is_taken_before_the_first(two_ranks: RankPool, name: str) -> None:
    """In bf16 at stage 0, against fp32."""
    expected = two_ranks.run(states_of, name, 0, {})[0]
    for built, stepped, masters in two_ranks.run(states_of, name, 0, BF16):
        assert built == expected[0]
        for found, state in zip(stepped, expected[1], strict=True):
            assert found == pytest.approx(state, rel=0.05, abs=1e-3)
        for master, weight in zip(masters, expected[2], strict=True):
            assert torch.equal(master, weight.bfloat16().float())


def with_adagrad(stage: int) -> tuple[dict[str, Tensor], bool]:
    """The weights after two steps, and whether their average is kept."""
    optimizer = {"name": "torch.optim:Adagrad", "lr": 1e-2}
    engines = engines_of(model(), feed, stage, optimizer=optimizer, ema_decay=0.5)
    train(engines, [torch.ones(4, 6)] * 2)
    states = engines["net"].ds.optimizer.state.values()
    found = weights_of(engines), all("ema" in state for state in states)
    engines.close()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adagrad_is_the_one_that_was_built(two_ranks: RankPool, stage: int) -> None:
    (expected, _), _ = two_ranks.run(with_adagrad, 0)
    for found, has_average in two_ranks.run(with_adagrad, stage):
        assert has_average
        for name, weight in expected.items():
            assert torch.allclose(found[name], weight, rtol=0, atol=1e-6), name
