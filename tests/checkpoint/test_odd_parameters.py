"""Parameters without dimensions or without elements: trained, saved, resharded, exported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import distributed
from harness.config import Config
from harness.convert.convert import Options, convert
from harness.data.sampler import RandomSampler
from harness.io import load
from harness.run import run_in_world
from harness.task import load_task
from tests.support.helpers import ROOT, Pools, assert_equal, exported, losses, tiny_config

STAGES = [0, 1, 2, 3]
ODD = {"gain.logit_scale": (), "shift": (), "extra.none": (0, 6), "extra.nothing": (3, 0)}


def config_of(directory: Path, stage: int, dtype: str = "fp32", **overrides: Any) -> Config:
    zero = {"stage3_param_persistence_threshold": 0}
    ds = {"zero_optimization": zero, "bf16": {"enabled": dtype == "bf16"}}
    task = {"path": str(ROOT / "tests/tasks/odd_task.py")}
    return tiny_config(
        directory, stage, engines={"net": {"ds_overrides": ds}}, task=task, **overrides
    )


def plain_losses(config: Config) -> tuple[list[float], dict[str, Any]]:
    """Every step's loss, and the weights at the end, in plain PyTorch."""
    distributed.seed_everything(config.run.seed)
    task = load_task(config)
    model = task.models["net"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    draws = RandomSampler(len(task.train_data), seed=config.run.seed).stream()
    found = []
    for _ in range(config.run.steps):
        optimizer.zero_grad()
        model(*task.collate([task.train_data[next(draws)] for _ in range(8)]))
        loss: Any = model.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found, model.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_they_train_as_in_plain_torch(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = config_of(tmp_path, stage)
    pools(2).run(run_in_world, config)
    expected, weights = plain_losses(config)
    assert losses(config) == pytest.approx(expected, abs=1e-6)
    found = exported(config)
    for name, weight in weights.items():
        assert found[name].shape == weight.shape
        assert torch.allclose(found[name], weight, rtol=0, atol=1e-6), name
    assert {name: tuple(found[name].shape) for name in ODD} == ODD


@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        ("fp32", [(2, 3), (1, 0), (2, 1)]),
        ("bf16", [(2, 0), (1, 3), (2, 2)]),
        ("fp32", [(2, 2), (2, 3)]),
    ],
    ids=str,
)
def test_they_are_resharded_and_converted(
    pools: Pools, tmp_path: Path, dtype: str, layouts: list[tuple[int, int]]
) -> None:
    """Two steps in each layout, `(ranks, stage)`."""
    parts = [
        config_of(
            tmp_path / "parts",
            stage,
            dtype,
            run={"steps": 2 * number},
            data={"micro_batch_size": 8 // ranks},
        )
        for number, (ranks, stage) in enumerate(layouts, 1)
    ]
    for part, (ranks, _) in zip(parts, layouts, strict=True):
        pools(ranks).run(run_in_world, part)
    config = parts[-1]
    whole = config_of(tmp_path / "whole", 1, dtype, run={"steps": config.run.steps})
    pools(2).run(run_in_world, whole)
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    assert losses(config) == pytest.approx(losses(whole), abs=tolerance)
    for name, weight in exported(whole).items():
        assert torch.allclose(exported(config)[name], weight, rtol=0, atol=tolerance), name
    convert(config.run_dir, tmp_path / "x.sft", Options(dtype="keep", verify=True), print)
    converted = load(tmp_path / "x.sft")
    assert {name: tuple(converted[name].shape) for name in ODD} == ODD
    assert_equal(exported(config), converted)


@pytest.mark.parametrize("stage", [0, 3])
def test_plain_deepspeed_gets_them(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = config_of(tmp_path, stage, run={"steps": 1})
    pools(2).run(run_in_world, config)
    convert(config.run_dir, tmp_path / "was.sft", Options(), print)
    for to_zero in (1, 3):
        directory = tmp_path / f"zero{to_zero}"
        convert(config.run_dir, directory, Options(to_zero=to_zero, ranks=3), print)
        convert(directory, tmp_path / f"{to_zero}.sft", Options(), print)
        assert_equal(load(tmp_path / f"{to_zero}.sft"), load(tmp_path / "was.sft"))
