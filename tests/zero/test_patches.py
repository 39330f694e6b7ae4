"""What DeepSpeed does differently from stage to stage, and does not any more."""

from argparse import Namespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from harness.testing.pool import RankPool
from harness.zero.engine_state import base_optimizer
from harness.zero.patches import _find_duplicates_at_once
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


class Permuted(nn.Module):
    """A frozen parameter that is no floating number, before all others."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.order = nn.Parameter(torch.tensor([0, 1, 1, 0, 1, 0], dtype=dtype), False)
        self.net = model()

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch * self.order.real.to(batch.dtype))


def with_frozen(dtype: torch.dtype, stage: int, ds: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after two steps, of which the second follows an edit."""
    engines = engines_of(Permuted(dtype), feed, stage, ds)
    train(engines, [torch.ones(4, 6)])
    with engines["net"].edit_weights() as complete:
        complete.get_parameter("order").data[0] = 1
    train(engines, [torch.ones(4, 6)])
    found = weights_of(engines)
    engines.close()
    return found


@pytest.mark.parametrize(
    ("dtype", "ds"),
    [
        (torch.int64, {}),
        (torch.int64, BF16),
        pytest.param(torch.bool, {}, marks=pytest.mark.slow),
        pytest.param(torch.float64, {}, marks=pytest.mark.slow),
        pytest.param(torch.complex64, {}, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_parameter_of_any_dtype_may_come_first(
    two_ranks: RankPool, dtype: torch.dtype, ds: dict[str, Any]
) -> None:
    expected, _ = two_ranks.run(with_frozen, dtype, 2, ds)
    for found in two_ranks.run(with_frozen, dtype, 3, ds):
        assert found["order"].dtype == dtype
        assert found["order"].real.tolist() == [1, 1, 1, 0, 1, 0]
        for name, weight in expected.items():
            assert torch.allclose(found[name], weight, rtol=0, atol=1e-2 if ds else 1e-6), name


def duplicates_found() -> list[str]:
    """What the engine's check says of optimizers with a parameter once, and twice; and how often it
    reads their groups."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    class Optimizer:
        reads = 0

        def __init__(self, *groups: list[nn.Parameter]):
            self.groups = groups

        @property
        def param_groups(self) -> list[dict[str, Any]]:
            Optimizer.reads += 1
            return [{"params": group} for group in self.groups]

    net = model()
    first, *others = net.parameters()
    engine, found = Namespace(module=net), []
    for optimizer in (
        Optimizer([first], others),
        Optimizer([first, *others], [first]),
        Optimizer([first, *others, first]),
    ):
        try:
            DeepSpeedEngine._check_for_duplicates(engine, optimizer)  # type: ignore[arg-type]
            found.append("none")
        except AssertionError as error:
            found.append(str(error))
    return [*found, str(Optimizer.reads)]


def known_ops() -> dict[str, bool]:
    import deepspeed

    return vars(deepspeed.ops).get("__compatible_ops__", {})


def test_no_compiler_is_asked_at_a_start(two_ranks: RankPool) -> None:
    """DeepSpeed would run compilers for all of its ops."""
    assert two_ranks.run(known_ops) == [{"deepspeed_shm_comm": False}] * 2


def duplicates_are_ours(version: str) -> bool:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    before = DeepSpeedEngine._check_for_duplicates
    with patch.object(deepspeed, "__version__", version):
        _find_duplicates_at_once()
    return DeepSpeedEngine._check_for_duplicates is not before


def test_a_newer_deepspeed_looks_for_duplicates_by_itself(two_ranks: RankPool) -> None:
    assert two_ranks.run(duplicates_are_ours, "0.19.9") == [True, True]
    assert two_ranks.run(duplicates_are_ours, "0.20.0") == [False, False]


def test_parameters_that_an_optimizer_has_twice_are_found_at_once(two_ranks: RankPool) -> None:
    twice = "parameter 0.weight occurs multiple times in optimizer.param_groups"
    assert two_ranks.run(duplicates_found)[0] == ["none", twice, twice, "3"]
