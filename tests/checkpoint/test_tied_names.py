"""Runs whose models have several names for one tensor: converted, resharded, exported, loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import distributed, io
from harness.checkpoint import resume
from harness.config import Config
from harness.config.sections import merge
from harness.convert.convert import Options, convert
from harness.engine.full_tensors import full_tensors
from harness.io.stored import read_tensor
from harness.run import run_in_world
from harness.zero.reader import SavedEngine
from tests.support.helpers import (
    ROOT,
    Pools,
    assert_equal,
    checkpoint,
    exported,
    tiny_config,
)
from tests.tasks.tied_task import Thrice

Layout = tuple[int, int]
"""`(ranks, ZeRO stage)`."""
THRICE = None
CASES = [
    pytest.param(THRICE, (2, 3), (1, 2), "bf16", True),
    pytest.param(THRICE, (2, 2), (2, 3), "bf16", False),
    pytest.param(7, (1, 0), (2, 3), "fp32", False),
    *(
        pytest.param(100 + 9 * seed, (ranks, stage), after, dtype, False, marks=pytest.mark.slow)
        for seed in range(3)
        for dtype in ("fp32", "bf16")
        for ranks, stage in ((1, 0), (3, 1), (2, 2), (2, 3))
        for after in ((2, (stage + 1) % 4), (1, (stage + 2) % 4), (3, 3))
    ),
]


def config_of(
    directory: Path, seed: int | None, layout: Layout, dtype: str, steps: int, **overrides: Any
) -> Config:
    ranks, stage = layout
    ds = {
        "zero_optimization": {"stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bf16"},
    }
    args = {} if seed is None else {"seed": seed}
    table = {
        "run": {"steps": steps},
        "task": {"path": str(ROOT / "tests/tasks/tied_task.py"), "args": args},
        "engines": {"net": {"ds_overrides": ds}},
        "data": {"micro_batch_size": 12 // ranks},
        "trainer": {"save_every": 2},
    }
    return tiny_config(directory, stage, **merge(table, overrides))


def resumed(config: Config) -> dict[str, Tensor]:
    """Rank 0's live weights once a run has resumed. Collective."""
    live: dict[str, Tensor] = {}
    restore = resume.restore

    def and_look(directory: Path, engines: Any, *others: Any) -> None:
        restore(directory, engines, *others)
        live.update({n: t for n, t in full_tensors(engines["net"]) if t is not None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "restore", and_look)
        run_in_world(config)
    return live if distributed.is_global_leader() else {}


@pytest.mark.parametrize(("seed", "before", "after", "dtype", "background"), CASES)
def test_they_agree_with_the_live_model(
    pools: Pools,
    tmp_path: Path,
    seed: int | None,
    before: Layout,
    after: Layout,
    dtype: str,
    background: bool,
) -> None:
    checkpoints = {"background": background}
    config = config_of(tmp_path, seed, before, dtype, 2, checkpoint=checkpoints)
    pools(before[0]).run(run_in_world, config)
    live, saved = exported(config), SavedEngine(checkpoint(config, 2) / "net")
    if seed is THRICE:
        assert live.keys() == {f"inner.{name}" for name in Thrice().state_dict()}
    convert(checkpoint(config, 2), tmp_path / "keep.sft", Options("weights", "keep"), print)
    assert_equal(io.load(tmp_path / "keep.sft"), live)
    convert(checkpoint(config, 2), tmp_path / "fp32.sft", Options(verify=True), print)
    fp32 = io.load(tmp_path / "fp32.sft")
    for name, tensor in fp32.items():
        assert torch.equal(tensor.to(live[name].dtype), live[name]), name
        if (source := saved.source(name)) in saved.shapes:
            assert torch.equal(tensor, read_tensor(saved.master(source))), name

    still = {"net": {"init_from": config.run_dir, "optimizer": {"lr": 0.0}}}
    started = config_of(tmp_path / "started", seed, after, dtype, 1, engines=still)
    pools(after[0]).run(run_in_world, started)
    others = SavedEngine(checkpoint(started, 1) / "net")
    for name in saved.shapes:
        assert torch.equal(read_tensor(others.master(name)), read_tensor(saved.master(name)))

    again = config_of(tmp_path, seed, after, dtype, 3)
    assert_equal(pools(after[0]).run(resumed, again)[0], live)
