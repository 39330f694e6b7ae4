"""The average of an engine's weights: correct at every ZeRO stage, saved, without side effects.

test_engines.py compares it with plain PyTorch's.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import Config
from harness.convert.convert import Options, convert
from harness.errors import CheckpointError
from harness.io import load
from harness.io.stored import read_tensor
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.support.helpers import (
    ROOT,
    Pools,
    assert_equal,
    checkpoint,
    error_of,
    exported,
    losses,
    records,
    tiny_config,
)
from tests.support.quick import quick

STAGES = [0, 1, 2, 3]
DECAY = 0.8
TWO_GROUPS = {"name": "tests.tasks.reshard_task:TwoGroups"}
APOLLO = {"name": "apollo", "rank": 2}
Layout = tuple[int, int]
"""`(ranks, ZeRO stage)`."""


def config_of(directory: Path, stage: int, **engine: Any) -> Config:
    """Six steps of the tiny task, with an average; every step is saved, exported and evaluated."""
    return tiny_config(
        directory,
        stage,
        engines={"net": {"ema_decay": DECAY} | engine},
        trainer={"save_every": 1, "eval_every": 1, "export_every": 1},
    )


def saved(config: Config, step: int) -> SavedEngine:
    return SavedEngine(checkpoint(config, step) / "net")


@pytest.mark.parametrize("stage", quick(STAGES, 0, 3))
def test_it_averages_the_master_weights_and_changes_nothing_else(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    bf16 = {"bf16": {"enabled": True}}
    config = config_of(tmp_path / "with", stage, ds_overrides=bf16)
    two_ranks.run(run_in_world, config)
    without = config_of(tmp_path / "without", stage, ds_overrides=bf16, ema_decay=None)
    two_ranks.run(run_in_world, without)
    assert losses(config) == losses(without)
    assert records(config, "eval/")[2] != records(without, "eval/")[2]
    averages: dict[str, Tensor] = {}
    for step in range(1, 7):
        engine = saved(config, step)
        for name in engine.shapes:
            master = read_tensor(engine.master(name))
            averages[name] = torch.lerp(averages.get(name, master), master, 1 - DECAY)
            assert torch.equal(read_tensor(engine.moment(name, "ema")), averages[name])
            assert averages[name].dtype == torch.float32
    weights, average = exported(config), exported(config, file="net.ema.sft")
    assert weights.keys() == average.keys() > averages.keys()
    last = saved(config, 6)
    for name, tensor in averages.items():
        assert torch.equal(average[name], tensor.bfloat16())
        assert torch.equal(weights[name], read_tensor(last.master(name)).bfloat16())
    convert(config.run_dir, tmp_path / "x.sft", Options(what="ema", verify=True), print)
    averages |= {"again.weight": averages["middle.weight"], "scale": weights["scale"].float()}
    assert_equal(load(tmp_path / "x.sft"), averages)
    convert(config.run_dir, tmp_path / "y.sft", Options(what="ema", dtype="keep"), print)
    assert_equal(load(tmp_path / "y.sft"), average)
    with pytest.raises(CheckpointError, match="has no EMA weights"):
        convert(without.run_dir, tmp_path / "z.sft", Options(what="ema"), print)
    assert torch.equal(average["again.weight"], average["middle.weight"])


@pytest.mark.parametrize("stage", [0, 3])
def test_it_resumes_to_the_bit_and_can_be_switched_off_and_on(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = config_of(tmp_path, stage)
    two_ranks.run(run_in_world, config)
    averages = {n: read_tensor(saved(config, 6).moment(n, "ema")) for n in saved(config, 6).shapes}

    def again(**engine: Any) -> SavedEngine:
        for step in (4, 5, 6):
            shutil.rmtree(checkpoint(config, step))
        two_ranks.run(run_in_world, config_of(tmp_path, stage, **engine))
        return saved(config, 6)

    resumed = again()
    assert_equal({name: read_tensor(resumed.moment(name, "ema")) for name in averages}, averages)
    off = again(ema_decay=None)
    assert all("ema" not in off.state_keys(name) for name in averages)
    for step in (5, 6):
        shutil.rmtree(checkpoint(config, step))
    two_ranks.run(run_in_world, config)  # on again: it begins with the weights of step 5
    engine, first = saved(config, 6), saved(config, 5)
    for name in averages:
        assert torch.equal(read_tensor(first.moment(name, "ema")), read_tensor(first.master(name)))
        expected = torch.lerp(
            read_tensor(first.master(name)), read_tensor(engine.master(name)), 1 - DECAY
        )
        assert torch.equal(read_tensor(engine.moment(name, "ema")), expected)


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    quick(
        [
            ((2, 2), (2, 3), TWO_GROUPS),
            ((2, 3), (2, 0), TWO_GROUPS),
            ((2, 0), (2, 1), TWO_GROUPS),
            ((2, 3), (4, 2), TWO_GROUPS),
            ((2, 1), (2, 3), APOLLO),
        ],
        ((2, 0), (2, 1), TWO_GROUPS),
        ((2, 3), (4, 2), TWO_GROUPS),
        ((2, 1), (2, 3), APOLLO),
    ),
    ids=str,
)
def test_it_is_resharded(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, optimizer: dict[str, Any]
) -> None:
    """The task has two parameter groups, frozen parameters and odd sizes."""

    def config(name: str, layout: Layout, steps: int) -> Config:
        engine = {
            "optimizer": optimizer,
            "ema_decay": DECAY,
            "ds_config": ROOT / f"ds_configs/zero{layout[1]}.json",
        }
        return tiny_config(
            tmp_path,
            run={"name": name, "steps": steps},
            task={"path": str(ROOT / "tests/tasks/reshard_task.py")},
            engines={"net": engine},
            data={"micro_batch_size": 8 // layout[0]},
        )

    full, resumed = config("full", before, 8), config("resumed", after, 8)
    pools(before[0]).run(run_in_world, full)
    pools(before[0]).run(run_in_world, config("resumed", before, 4))
    pools(after[0]).run(run_in_world, resumed)
    expected, found = (exported(run, file="net.ema.sft") for run in (full, resumed))
    weights = exported(full)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
    assert max(float((weights[n] - expected[n]).abs().max()) for n in expected) > 1e-2


def test_an_optimizer_with_an_average_of_its_own_is_refused(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    pytest.importorskip("schedulefree")
    config = config_of(tmp_path, 0, optimizer={"name": "schedulefree"})
    (error, _) = two_ranks.run(error_of, config)
    assert (
        "engines.net.ema_decay: optimizer 'schedulefree' keeps its own average of the weights"
        in error
    )
    assert not config.run_dir.exists()


@pytest.mark.parametrize("stage", quick([1, 3], 3))
def test_apollo_can_be_averaged(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    config = config_of(tmp_path / "with", stage, optimizer=APOLLO)
    two_ranks.run(run_in_world, config)
    without = config_of(tmp_path / "without", stage, optimizer=APOLLO, ema_decay=None)
    two_ranks.run(run_in_world, without)
    assert losses(config) == losses(without)
    averages: dict[str, Tensor] = {}
    for step in range(1, 7):
        for name, weight in exported(without, step).items():
            averages[name] = torch.lerp(averages.get(name, weight), weight, 1 - DECAY)
    found = exported(config, file="net.ema.sft")
    assert found.keys() == averages.keys()
    for name, tensor in averages.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
