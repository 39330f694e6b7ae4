"""16-bit engines with float32 buffers, and submodules that are kept in float32."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from harness import distributed
from harness.config import Config
from harness.data.sampler import RandomSampler
from harness.engine.build import build_engines
from harness.run import run_in_world
from harness.task import load_task
from harness.testing.pool import RankError, RankPool
from tests.support.helpers import ROOT, exported, log_text, losses, tiny_config

STAGES = [0, 1, 2, 3]
BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def config_of(directory: Path, kind: str, stage: int, ds: Any, **engine: Any) -> Config:
    """A run of some steps."""
    args = {"kind": kind} | ({"half": True} if engine.pop("half", False) else {})
    ds = ds | {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return tiny_config(
        directory,
        stage,
        run={"steps": 3},
        task={"path": str(ROOT / "tests/tasks/buffers_task.py"), "args": args},
        engines={"net": {"ds_overrides": ds} | engine},
    )


def plain_loss(config: Config, autocast: bool) -> float:
    """The first loss of plain PyTorch over the batches of two ranks: of `model.bfloat16()`, or of
    the float32 model under autocast."""
    distributed.seed_everything(config.run.seed)
    task = load_task(config)
    model = task.models["net"]
    dtype = torch.float32 if autocast else torch.bfloat16
    model.to(dtype)
    if hasattr(model, "inv_freq"):  # a user of plain PyTorch keeps the angles
        model.register_buffer("inv_freq", 10.0 ** -torch.arange(4.0), persistent=False)
    draws = RandomSampler(len(task.train_data), seed=config.run.seed).stream()
    samples = [task.train_data[next(draws)] for _ in range(8)]
    total = 0.0
    for rank in (0, 1):
        x, y = default_collate(samples[rank::2])
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            model(x.to(dtype), y.to(dtype))
        loss = model.loss
        assert isinstance(loss, torch.Tensor)
        total += loss.item() / 2
    return total


@pytest.mark.parametrize(("kind", "stage"), [("positions", s) for s in STAGES] + [("norm", 1)])
def test_buffers_are_cast_with_the_model(
    two_ranks: RankPool, tmp_path: Path, kind: str, stage: int
) -> None:
    keys = BF16 | {"data_types": {"keep_in_fp32_modules": ["inv_freq"]}}
    config = config_of(tmp_path, kind, stage, keys, buffer_dtype="model")
    two_ranks.run(run_in_world, config)
    assert losses(config)[0] == pytest.approx(plain_loss(config, autocast=False), rel=2e-3)
    weights = exported(config)
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize(("kind", "stage"), [("positions", 1), ("headed", 0), ("norm", 3)])
def test_an_error_names_the_keys(
    two_ranks: RankPool, tmp_path: Path, kind: str, stage: int
) -> None:
    config = config_of(tmp_path, kind, stage, BF16)
    buffers = r"Buffers are still in float32 \(.*\): engines.net.buffer_dtype = \"model\" casts.*"
    expected = (
        "RuntimeError.*engine 'net': DeepSpeed has cast all parameters to bfloat16.*"
        + (buffers if kind != "headed" else "")
        + r"engines.net.ds_overrides = \{ bf16 = \{ enabled = false \}, torch_autocast = "
    )
    with pytest.raises(RankError, match=re.compile(expected, re.DOTALL)):
        two_ranks.run(run_in_world, config)


@pytest.mark.parametrize(
    ("kind", "stage"), [*[("headed", stage) for stage in STAGES], ("norm", 2), ("positions", 3)]
)
def test_autocast_keeps_submodules_and_statistics_in_float32(
    two_ranks: RankPool, tmp_path: Path, kind: str, stage: int
) -> None:
    config = config_of(tmp_path, kind, stage, AUTOCAST)
    two_ranks.run(run_in_world, config)
    assert losses(config)[0] == pytest.approx(plain_loss(config, autocast=True), rel=2e-3)
    assert {w.dtype for w in exported(config).values() if w.is_floating_point()} == {torch.float32}


def test_a_cast_of_what_is_kept_in_float32_is_logged(two_ranks: RankPool, tmp_path: Path) -> None:
    config = config_of(tmp_path, "headed", 1, BF16, half=True)
    with pytest.raises(RankError):
        two_ranks.run(run_in_world, config)
    expected = "net: cast to bfloat16, although the model keeps them in float32: head.weight, "
    assert expected in log_text(config)


def buffer_dtypes(config: Config) -> dict[str, torch.dtype]:
    """The dtypes of an engine's buffers."""
    engines = build_engines(load_task(config), config)
    found = {name: tensor.dtype for name, tensor in engines["net"].module.named_buffers()}
    engines.close()
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_rotary_angles_stay_in_float32(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    kept = {"data_types": {"keep_in_fp32_modules": ["inv_freq"]}}
    half, full = torch.bfloat16, torch.float32
    for ds, engine, expected in (
        (BF16, {}, {"table": full, "inv_freq": full}),
        (BF16, {"buffer_dtype": "model"}, {"table": half, "inv_freq": half}),
        (BF16 | kept, {"buffer_dtype": "model"}, {"table": half, "inv_freq": full}),
        ({}, {"buffer_dtype": "model"}, {"table": full, "inv_freq": full}),
    ):
        config = config_of(tmp_path, "positions", stage, ds, **engine)
        assert two_ranks.run(buffer_dtypes, config) == [expected] * 2
