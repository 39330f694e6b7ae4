"""Gradients of parameters that not every micro-batch uses, against plain PyTorch."""

import re
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import distributed
from harness.config import Config
from harness.config.sections import merge
from harness.convert.run_checkpoints import checkpoints_in
from harness.run import run_in_world
from harness.task import load_task
from harness.testing.pool import RankError, RankPool
from tests.support.helpers import (
    OFFLOAD,
    ROOT,
    Pools,
    error_of,
    exported,
    losses,
    tiny_config,
)
from tests.tasks.branches_task import Once

STAGES = [0, 1, 2, 3]
SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 150}}
"""Several for a model of a few layers."""
ON_ARRIVAL = {"zero_optimization": {"overlap_comm": True}}
"""ZeRO 1 fills its buckets like ZeRO 2."""
TWICE = {"gradient_accumulation_steps": 2}


def config_of(
    directory: Path, stage: int, args: dict[str, Any], *ds: dict[str, Any], **overrides: Any
) -> Config:
    """A run of `branches_task`, with DeepSpeed's keys `ds`; nothing persists at ZeRO 3."""
    keys: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    for more in ds:
        keys = merge(keys, more)
    fixed = {
        "task": {"path": str(ROOT / "tests/tasks/branches_task.py"), "args": args},
        "engines": {"net": {"ds_overrides": keys}},
        "data": {"sampler": "ordered"},
    }
    ends_quietly = {"trainer": {"save_at_end": False, "export_at_end": False}}
    return tiny_config(directory, stage, **merge(merge(fixed, ends_quietly), overrides))


def zeros(directory: Path, stage: int, args: dict[str, Any], *ds: dict[str, Any]) -> Config:
    engines = {"net": {"unused_parameters": "zeros"}}
    return config_of(directory, stage, args, SMALL_BUCKETS, *ds, engines=engines)


def plain_losses(config: Config, world: int = 2) -> list[float]:
    """The same in one process: what a micro-batch does not use has a gradient of zero."""
    distributed.seed_everything(config.run.seed)
    task = load_task(config)
    net, settings = task.models["net"], config.engines["net"]
    assert settings.optimizer is not None
    optimizer = torch.optim.AdamW(net.parameters(), settings.optimizer.lr, weight_decay=0.1)
    size, accumulation = config.data.micro_batch_size, settings.gradient_accumulation
    draw, found = 0, []
    for _ in range(config.run.steps):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step_loss = 0.0
        for _ in range(accumulation):
            for rank in range(world):
                picked = range(draw + rank, draw + size * world, world)
                net(*task.collate([task.train_data[index] for index in picked]))
                loss = net.__dict__.pop("loss") / world / accumulation
                loss.backward()
                step_loss += loss.item()
            draw += size * world
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        found.append(step_loss)
    return found


def compare(pool: RankPool, config: Config) -> None:
    pool.run(run_in_world, config)
    assert losses(config) == pytest.approx(plain_losses(config, pool.world_size), abs=1e-6)


# ------------------------------------------------------------------ other parameters on other ranks

QUICK = [
    ("experts", 1, 2),
    ("experts", 2, 1),
    ("experts", 3, 2),
    ("shapes", 2, 2),
    ("shapes", 3, 1),
]
ALL = product(["experts", "shapes", "order", "sometimes"], STAGES, [1, 2])


@pytest.mark.parametrize(
    ("kind", "stage", "accumulation"),
    [pytest.param(*way, marks=() if way in QUICK else pytest.mark.slow) for way in ALL],
)
def test_with_zeros_ranks_may_use_different_parameters(
    two_ranks: RankPool, tmp_path: Path, kind: str, stage: int, accumulation: int
) -> None:
    accumulate = {"gradient_accumulation_steps": accumulation}
    compare(two_ranks, zeros(tmp_path, stage, {"kind": kind}, accumulate))


@pytest.mark.parametrize("ds", [(ON_ARRIVAL, TWICE), (OFFLOAD, TWICE)], ids=["overlap", "offload"])
def test_with_zeros_at_zero_1_with_other_settings(
    two_ranks: RankPool, tmp_path: Path, ds: tuple[dict[str, Any], ...]
) -> None:
    compare(two_ranks, zeros(tmp_path, 1, {"kind": "experts"}, *ds))


@pytest.mark.parametrize("kind", ["experts", pytest.param("shapes", marks=pytest.mark.slow)])
def test_with_zeros_a_feeder_may_gather_weights_itself(
    two_ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    compare(two_ranks, zeros(tmp_path, 3, {"kind": kind, "feeder": "look"}, TWICE))


def test_with_zeros_a_feeder_may_not_change_what_it_gathers(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    for error in two_ranks.run(error_of, zeros(tmp_path, 3, {"kind": "order", "feeder": "change"})):
        assert "change would be lost: use `with engine.edit_weights() as model" in error


@pytest.mark.parametrize("stage", [1, 3])
def test_the_experts_of_a_bug_report(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    settings = {"unused_parameters": "zeros", "optimizer": {"weight_decay": 0.01}}
    config = config_of(tmp_path, stage, {"kind": "case experts"}, engines={"net": settings})
    two_ranks.run(run_in_world, config)
    assert losses(config)[:3] == pytest.approx([0.5040, 0.4141, 0.5402], abs=1e-4)


ONLY_SOME = (
    "engine 'net': step 1: in micro-batch 1, only some ranks had gradients for: "
    "experts.0.0.weight, .*, experts.0.2.bias (rank 1); "
    "experts.1.0.weight, .*, experts.1.2.bias (rank 0). .* "
    'set engines.net.unused_parameters = "zeros"'
)
OTHER_GRADIENTS = (
    "step 1: in micro-batch 1, the ranks had the gradients in different orders: gradient 5 is "
    "experts.0.2.weight on rank 0, experts.1.2.weight on rank 1. "
)
OTHER_CALLS = (
    "step 1: the ranks called the modules in different orders: call 4 is experts.1 on rank 0, "
    "experts.0 on rank 1. "
)


@pytest.mark.parametrize(
    ("kind", "stage", "expected"),
    [
        ("experts", 1, ONLY_SOME),
        ("experts", 2, ONLY_SOME),
        ("experts", 3, ONLY_SOME),
        ("order", 2, OTHER_GRADIENTS),
        ("order", 3, OTHER_CALLS),
    ],
)
def test_other_parameters_on_other_ranks_end_the_run_without_a_save(
    two_ranks: RankPool, tmp_path: Path, kind: str, stage: int, expected: str
) -> None:
    config = config_of(tmp_path, stage, {"kind": kind}, trainer={"save_every": 1})
    errors = two_ranks.run(error_of, config)
    assert errors[0] == errors[1]
    assert re.search(re.escape(expected).replace(r"\.\*", ".*"), errors[0])
    assert not checkpoints_in(config.run_dir / "checkpoints")


def error_between_exchanges(config: Config) -> str:
    """Of a run whose export is too fast for an exchange between its tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.control.bus.Bus.skips_exchange", lambda bus: True)
        return error_of(config)


def test_nothing_is_exported_of_a_step_with_other_parameters_on_other_ranks(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = config_of(tmp_path, 1, {"kind": "experts"}, trainer={"export_every": 1})
    for error in two_ranks.run(error_between_exchanges, config):
        assert "engine 'net': step 1: in micro-batch 1, only some ranks had gradients" in error
    assert not list(config.run_dir.glob("exports/*"))


def write_error(config: Config, directory: Path) -> None:
    """Like `error_of`, if other ranks may die."""
    text = error_of(config)
    (directory / f"rank{distributed.global_rank()}").write_text(text)


def errors_of_survivors(config: Config, directory: Path) -> list[str]:
    """The errors that ranks report, while others die or wait for each other."""
    with suppress(RankError), RankPool(2, timeout_s=10) as fresh:
        fresh.run(distributed.barrier)  # with the timeout of collectives
        fresh.timeout_s = 60
        fresh.run(write_error, config, directory)
    return [path.read_text() for path in directory.glob("rank?")]


OTHER_BUCKETS = "the ranks had the gradients in different orders: gradient 3 is experts."
UNEQUAL = [
    ("shapes", 2, "1", OTHER_BUCKETS + "1.2.bias on rank 0, experts.0.2.bias on rank 1. "),
    ("shapes", 3, "1", OTHER_CALLS.partition("step 1: ")[2]),
    ("late shapes", 2, "4", OTHER_BUCKETS + "0.2.bias on rank 0, experts.1.2.bias on rank 1. "),
    ("late shapes", 3, "4", "called the modules in different orders: call 4 is experts.0 on rank"),
    ("late skip", 2, "4", OTHER_BUCKETS),
    ("late skip", 3, "4", "called the modules in different orders: call 8 is last on rank 0, exp"),
]


@pytest.mark.parametrize(
    ("kind", "stage", "step", "expected"),
    [pytest.param(*way, marks=() if way[0] == "shapes" else pytest.mark.slow) for way in UNEQUAL],
)
def test_where_a_collective_fails_the_remaining_ranks_say_how_they_differ(
    tmp_path: Path, kind: str, stage: int, step: str, expected: str
) -> None:
    config = config_of(tmp_path, stage, {"kind": kind}, SMALL_BUCKETS, trainer={"save_every": 1})
    errors = errors_of_survivors(config, tmp_path)
    assert errors
    for error in errors:
        assert f"engine 'net': step {step}: a collective has failed, as the ranks" in error
        assert expected in error
        assert 'set engines.net.unused_parameters = "zeros"' in error


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_is_killed_is_a_lost_rank(tmp_path: Path, stage: int) -> None:
    config = config_of(tmp_path, stage, {"kind": "late death"}, SMALL_BUCKETS)
    [error] = errors_of_survivors(config, tmp_path)
    assert "has lost rank" in error


@pytest.mark.parametrize("stage", [0, 1])
def test_another_order_is_harmless_where_gradients_are_reduced_in_the_models_order(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    compare(two_ranks, config_of(tmp_path, stage, {"kind": "order"}))


def test_at_zero_3_ranks_may_differ_inside_of_a_leaf_module(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    leaf = {"zero_optimization": {"leaf_module": {"names": ["experts"]}}}
    compare(two_ranks, config_of(tmp_path, 3, {"kind": "experts"}, SMALL_BUCKETS, leaf))


@pytest.mark.parametrize("stage", [1, 2])
def test_reentrant_checkpointing_with_zeros(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = zeros(tmp_path, stage, {"kind": "experts", "reentrant": True})
    if stage == 1:
        compare(two_ranks, config)
    else:
        assert "use_reentrant=False" in two_ranks.run(error_of, config)[0]


# ------------------------------------------------------------------- parameters without a gradient

WAYS = [(stage, {}) for stage in STAGES] + [(stage, OFFLOAD) for stage in (1, 2, 3)]


@pytest.mark.parametrize(("stage", "ds"), WAYS)
def test_a_parameter_without_a_gradient_has_a_gradient_of_zero(
    two_ranks: RankPool, tmp_path: Path, stage: int, ds: dict[str, Any]
) -> None:
    """Not what an earlier step or micro-batch has left."""
    compare(two_ranks, config_of(tmp_path, stage, {"kind": "sometimes"}, ds, TWICE))


@pytest.mark.parametrize(("stage", "ds"), WAYS)
def test_a_layer_that_only_the_first_step_uses_stays_where_it_is(
    pools: Pools, tmp_path: Path, stage: int, ds: dict[str, Any]
) -> None:
    """The case of a bug report, with plain SGD."""
    config = config_of(
        tmp_path,
        stage,
        {"kind": "case once"},
        ds,
        run={"steps": 4},
        engines={"net": {"optimizer": {"name": "torch.optim:SGD", "lr": 0.1, "weight_decay": 0.0}}},
        trainer={"export_every": 1, "export_at_end": True},
    )
    pools(1).run(run_in_world, config)
    sums = [exported(config, step)["extra.weight"].sum().item() for step in (1, 2, 3, 4)]
    assert Once().extra.weight.sum().item() == pytest.approx(-0.7468, abs=1e-4)
    assert sums == pytest.approx([-0.7946] * 4, abs=1e-4)


# ----------------------------------------------------------------------------- backwards of feeders


@pytest.mark.parametrize("stage", STAGES)
def test_a_feeder_must_not_call_backward(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    config = config_of(tmp_path, stage, {"kind": "sometimes", "feeder": "twice"})
    for error in two_ranks.run(error_of, config):
        assert "engine 'net': a second backward in one micro-batch" in error


def test_a_feeder_must_not_step(two_ranks: RankPool, tmp_path: Path) -> None:
    config = config_of(tmp_path, 2, {"kind": "sometimes", "feeder": "step"})
    for error in two_ranks.run(error_of, config):
        assert "engine 'net' was stepped in its own turn" in error


@pytest.mark.parametrize("stage", [1, 3])
def test_a_feeder_may_call_the_module_itself(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    """DeepSpeed's own forward prepares the next backward."""
    args = {"kind": "sometimes", "feeder": "module"}
    compare(two_ranks, config_of(tmp_path, stage, args, TWICE, ON_ARRIVAL))
