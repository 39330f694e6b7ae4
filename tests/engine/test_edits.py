"""Weights that a task changes in place, at every ZeRO stage, against plain PyTorch."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import distributed
from harness.errors import TaskError
from harness.testing.pool import RankPool
from harness.zero.engine_state import base_optimizer
from tests.support.helpers import OFFLOAD
from tests.support.small_loop import engines_of, train, weights_of

STAGES = [0, 1, 2, 3]
SLOW = pytest.mark.slow
LAYOUTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "offload": OFFLOAD,
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def batches(steps: int) -> list[Tensor]:
    return list(torch.randn(steps, 4, 6, generator=torch.Generator().manual_seed(1)))


def loss_of(output: Tensor) -> Tensor:
    return (output.float() - 1).square().mean()


@torch.no_grad()
def edit(model: Any) -> None:
    """Clamps a matrix, and restarts some of a bias at random."""
    model[0].weight.clamp_(-0.1, 0.1)
    model[2].bias[:2] = torch.randn(2)


def clamp_before_each_step(engine: Any, batch: Tensor) -> Any:
    torch.manual_seed(engine.counters.global_step + 100 * distributed.global_rank())
    with engine.edit_weights() as complete:
        edit(complete)
    return loss_of(engine(batch.to(engine.dtype))), {}


def edited(stage: int, layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights after three steps, and after an edit that changes nothing."""
    engines = engines_of(model(), clamp_before_each_step, stage, LAYOUTS[layout], ema_decay=0.9)
    train(engines, batches(3))
    found = weights_of(engines)
    base = base_optimizer(engines["net"].ds)
    flats = [p for group in base.param_groups for p in group["params"]]
    before = [flat.detach().clone() for flat in flats]
    with engines["net"].edit_weights():
        pass
    again = weights_of(engines)
    assert all(map(torch.equal, before, flats))  # masters keep the precision that weights lack
    engines.close()
    return found, again


def plain() -> dict[str, Tensor]:
    """What rank 0 draws counts everywhere."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for step, batch in enumerate(batches(3)):
        torch.manual_seed(step)
        edit(net)
        optimizer.zero_grad()
        loss_of(net(batch)).backward()
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        pytest.param(stage, layout, marks=() if stage == 3 or layout != "offload" else SLOW)
        for stage in STAGES
        for layout in LAYOUTS
    ],
)
def test_an_edit_lasts_at_every_stage(two_ranks: RankPool, stage: int, layout: str) -> None:
    expected = plain()
    tolerance = 2e-2 if layout == "bf16" else 1e-6
    for found, again in two_ranks.run(edited, stage, layout):
        for name, weight in expected.items():
            assert torch.equal(found[name], again[name])
            assert torch.allclose(found[name].float(), weight, rtol=0, atol=tolerance), name


def edit_late(engine: Any, batch: Tensor) -> Any:
    loss = loss_of(engine(batch))
    with engine.edit_weights() as complete:
        edit(complete)
    return loss, {}


def refused(during: str) -> str:
    feeder = edit_late if during == "step" else clamp_before_each_step
    ds = {"gradient_accumulation_steps": 2}
    engines = engines_of(model(), feeder, 1, ds if during == "accumulation" else {})
    with pytest.raises(TaskError) as error:
        if during == "evaluation":
            engines.evaluate(batches(1)[0])
        else:
            train(engines, batches(2))
    engines.close()
    return str(error.value)


@pytest.mark.parametrize("during", ["step", "accumulation", "evaluation"])
def test_an_edit_in_a_step_or_an_evaluation_is_refused(two_ranks: RankPool, during: str) -> None:
    for error in two_ranks.run(refused, during):
        assert "the weights of engine 'net' were edited in the turn of engine 'net'" in error


def clamp_without_a_word(engine: Any, batch: Tensor) -> Any:
    if engine.counters.micro_step:  # in the first one it is refused at stage 3
        with torch.no_grad():
            engine.module[0].weight.clamp_(-0.1, 0.1)
    return loss_of(engine(batch.to(engine.dtype))), {}


def call(engine: Any, batch: Tensor) -> Any:
    return loss_of(engine(batch.to(engine.dtype))), {}


def warnings_of(
    stage: int, dtype: str, feeder: Any, build: Callable[[], nn.Module] = model
) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("harness.engine.edits").addHandler(handler)
    engines = engines_of(build(), feeder, stage, LAYOUTS[dtype], ema_decay=0.9)
    train(engines, batches(2))
    with engines.averaged():
        pass
    train(engines, batches(2))
    engines.close()
    logging.getLogger("harness.engine.edits").removeHandler(handler)
    return messages


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (2, "offload"), (3, "fp32"), (3, "bf16")],
)
def test_an_edit_that_would_be_undone_is_noticed(
    two_ranks: RankPool, stage: int, dtype: str
) -> None:
    """Where the parameters are masters it lasts."""
    for warnings in two_ranks.run(warnings_of, stage, dtype, clamp_without_a_word):
        assert bool(warnings) == ((stage, dtype) != (0, "fp32"))
        for warning in warnings:
            assert (
                "outside of engine.edit_weights(): 0.weight: the next step undoes this" in warning
            )
    for warnings in two_ranks.run(warnings_of, stage, dtype, clamp_before_each_step):
        assert not warnings


class Changed(nn.Linear):
    """Changes its weight in every forward, in a way that torch does not count."""

    def __init__(self, change: Callable[[nn.Module], None]):
        super().__init__(6, 9)
        self._change = change

    def forward(self, input: Tensor) -> Tensor:
        self._change(self)
        return super().forward(input)


def clamp(layer: Any) -> None:
    layer.weight.data.clamp_(-0.1, 0.1)


def scale_a_row(layer: Any) -> None:
    layer.weight.data[0] *= 0.5


def replace(layer: Any) -> None:
    layer.weight.data = layer.weight.data / 2


def leave(layer: Any) -> None:
    layer.weight.data.clamp_(-100, 100)
    layer.weight.data = layer.weight.data.float().to(layer.weight.dtype)


def changed(change: Callable[[nn.Module], None]) -> nn.Module:
    return nn.Sequential(Changed(change), nn.Tanh(), nn.Linear(9, 3))


@pytest.mark.parametrize("change", [clamp, scale_a_row, replace, leave])
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_change_of_data_that_would_be_undone_is_noticed(
    two_ranks: RankPool, stage: int, dtype: str, change: Callable[[nn.Module], None]
) -> None:
    """In the first micro-batch, if it changes anything."""
    for warnings in two_ranks.run(warnings_of, stage, dtype, call, partial(changed, change)):
        assert len(warnings) == (change is not leave and (stage, dtype) != (0, "fp32"))
        assert all("edit_weights(): 0.weight: the next step undoes this" in w for w in warnings)


def clamp_data_before_each_step(engine: Any, batch: Tensor) -> Any:
    with engine.edit_weights() as complete:
        complete[0].weight.data.clamp_(-0.1, 0.1)
    return call(engine, batch)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_edit_of_data_is_no_false_alarm(two_ranks: RankPool, stage: int) -> None:
    assert two_ranks.run(warnings_of, stage, "fp32", clamp_data_before_each_step) == [[], []]


def half_frozen() -> nn.Module:
    net: Any = model()
    net[2].requires_grad_(False)
    return net


def move_what_is_frozen(engine: Any, batch: Tensor) -> Any:
    if engine.counters.micro_step:
        with torch.no_grad():
            engine.module[2].bias.add_(0.1)
    return call(engine, batch)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_edit_of_frozen_weights_is_lost_at_stage_3_alone(
    two_ranks: RankPool, stage: int
) -> None:
    for warnings in two_ranks.run(warnings_of, stage, "fp32", move_what_is_frozen, half_frozen):
        assert bool(warnings) == (stage == 3)


def one_parameter() -> nn.Module:
    return nn.Linear(batches(1)[0].shape[-1], 4, bias=False)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_parameter_that_is_alone_in_its_group_is_no_false_alarm(
    two_ranks: RankPool, stage: int, dtype: str
) -> None:
    """At stages 1 and 2 DeepSpeed's flat tensor is the parameter itself."""
    assert two_ranks.run(warnings_of, stage, dtype, call, one_parameter) == [[], []]
