"""The average of an engine's weights: right at every ZeRO stage, kept, and in nobody's way.

That it is the one of plain PyTorch is tested in test_engines.py.
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
from harness.io.stored import read
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.support.helpers import ROOT, error_of, losses, records, tiny_config

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


def exported(config: Config, step: int, stem: str) -> dict[str, Tensor]:
    return load(config.run_dir / f"exports/step-{step:08d}/{stem}.sft")


def saved(config: Config, step: int) -> SavedEngine:
    return SavedEngine(config.run_dir / f"checkpoints/step-{step:08d}/net")


@pytest.mark.parametrize("stage", STAGES)
def test_it_follows_the_master_weights_and_disturbs_nothing(
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
            master = read(engine.master(name))
            averages[name] = torch.lerp(averages.get(name, master), master, 1 - DECAY)
            assert torch.equal(read(engine.moment(name, "ema")), averages[name])
            assert averages[name].dtype == torch.float32
    weights, average = exported(config, 6, "net"), exported(config, 6, "net.ema")
    assert weights.keys() == average.keys() > averages.keys()
    last = saved(config, 6)
    for name, tensor in averages.items():
        assert torch.equal(average[name], tensor.bfloat16())
        assert torch.equal(weights[name], read(last.master(name)).bfloat16())
    convert(config.run_dir, tmp_path / "x.sft", Options(what="ema", verify=True), print)
    converted = load(tmp_path / "x.sft")
    assert converted.keys() == average.keys()
    averages |= {"again.weight": averages["middle.weight"], "scale": weights["scale"].float()}
    assert all(torch.equal(converted[name], averages[name]) for name in converted)
    convert(config.run_dir, tmp_path / "y.sft", Options(what="ema", dtype="keep"), print)
    kept = load(tmp_path / "y.sft")
    assert all(torch.equal(kept[name], average[name]) for name in average)
    with pytest.raises(CheckpointError, match="no average of the weights here"):
        convert(without.run_dir, tmp_path / "z.sft", Options(what="ema"), print)
    assert torch.equal(average["again.weight"], average["middle.weight"])


@pytest.mark.parametrize("stage", [0, 3])
def test_it_resumes_to_the_bit_and_can_be_switched_off_and_on(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = config_of(tmp_path, stage)
    two_ranks.run(run_in_world, config)
    whole = {name: read(saved(config, 6).moment(name, "ema")) for name in saved(config, 6).shapes}

    def again(**engine: Any) -> SavedEngine:
        for step in (4, 5, 6):
            shutil.rmtree(config.run_dir / f"checkpoints/step-{step:08d}")
        two_ranks.run(run_in_world, config_of(tmp_path, stage, **engine))
        return saved(config, 6)

    resumed = again()
    assert all(torch.equal(read(resumed.moment(name, "ema")), whole[name]) for name in whole)
    off = again(ema_decay=None)
    assert all("ema" not in off.state_keys(name) for name in whole)
    for step in (5, 6):
        shutil.rmtree(config.run_dir / f"checkpoints/step-{step:08d}")
    two_ranks.run(run_in_world, config)  # on again: it begins with the weights of step 5
    engine, first = saved(config, 6), saved(config, 5)
    for name in whole:
        assert torch.equal(read(first.moment(name, "ema")), read(first.master(name)))
        expected = torch.lerp(read(first.master(name)), read(engine.master(name)), 1 - DECAY)
        assert torch.equal(read(engine.moment(name, "ema")), expected)


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        ((2, 2), (2, 3), TWO_GROUPS),
        ((2, 3), (2, 0), TWO_GROUPS),
        ((2, 0), (2, 1), TWO_GROUPS),
        ((2, 3), (4, 2), TWO_GROUPS),
        ((2, 1), (2, 3), APOLLO),
    ],
    ids=str,
)
def test_it_goes_over_to_another_layout(
    two_ranks: RankPool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    before: Layout,
    after: Layout,
    optimizer: dict[str, Any],
) -> None:
    """The task has two parameter groups, frozen parameters and odd sizes."""
    after_ranks = two_ranks if after[0] == 2 else request.getfixturevalue("four_ranks")

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

    two_ranks.run(run_in_world, config("whole", before, 8))
    two_ranks.run(run_in_world, config("parts", before, 4))
    after_ranks.run(run_in_world, config("parts", after, 8))
    ends = [config("whole", before, 8), config("parts", after, 8)]
    whole, parts = (exported(end, 8, "net.ema") for end in ends)
    weights = exported(ends[0], 8, "net")
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=0)
    assert max(float((weights[n] - whole[n]).abs().max()) for n in whole) > 1e-2


def test_an_optimizer_with_an_average_of_its_own_is_refused(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    pytest.importorskip("schedulefree")
    config = config_of(tmp_path, 0, optimizer={"name": "schedulefree"})
    (told, _) = two_ranks.run(error_of, config)
    assert "engines.net.ema_decay: optimizer 'schedulefree' keeps an average of its own" in told
    assert not config.run_dir.exists()


@pytest.mark.parametrize("stage", [1, 3])
def test_apollo_can_be_averaged(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    config = config_of(tmp_path / "with", stage, optimizer=APOLLO)
    two_ranks.run(run_in_world, config)
    without = config_of(tmp_path / "without", stage, optimizer=APOLLO, ema_decay=None)
    two_ranks.run(run_in_world, without)
    assert losses(config) == losses(without)
    averages: dict[str, Tensor] = {}
    for step in range(1, 7):
        for name, weight in exported(without, step, "net").items():
            averages[name] = torch.lerp(averages.get(name, weight), weight, 1 - DECAY)
    found = exported(config, 6, "net.ema")
    assert found.keys() == averages.keys()
    for name, tensor in averages.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
