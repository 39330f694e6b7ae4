"""Runs of Muon and SOAP resume: to the bit on the same layout, and on any other."""

from pathlib import Path
from typing import Any

import pytest

from harness.config import Config
from harness.convert.plan import plan_optimizer
from harness.errors import CheckpointError
from harness.io.stored import materialize
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.checkpoint.test_reshard import (
    ODD,
    Layout,
    both,
    config_of,
    copy_checkpoint,
    losses,
)
from tests.support.helpers import Pools, checkpoint, error_of

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 1e-2, "adam_lr": 3e-3, "matrices": "weight"},
    "soap": {"lr": 1e-2, "matrices": "weight", "precondition_frequency": 3},
}
SLOW = pytest.mark.slow


def run_of(
    directory: Path, layout: Layout, name: str, steps: int, ds: Any = None, **args: Any
) -> Config:
    zero = {"sub_group_size": 50, "round_robin_gradients": True, "parameter_alignment": True}
    engine = {
        "optimizer": {"name": name} | OPTIMIZERS[name] | args,
        "ds_overrides": {"zero_optimization": zero} | (ds or {}),
    }
    return config_of(directory, layout, engine, steps=steps, task=ODD)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("muon", (2, 2)),
        ("soap", (2, 2)),
        pytest.param("muon", (2, 3), marks=SLOW),
        pytest.param("soap", (2, 3), marks=SLOW),
    ],
)
def test_a_run_in_bf16_resumes_to_the_bit(
    pools: Pools, tmp_path: Path, name: str, layout: Layout
) -> None:
    full, resumed = (
        run_of(tmp_path / directory, layout, name, 8, {"bf16": {"enabled": True}})
        for directory in ("full", "resumed")
    )
    pools(2).run(run_in_world, full)
    copy_checkpoint(full, resumed)
    pools(2).run(run_in_world, resumed)
    assert losses(resumed) == losses(full)[4:]


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ((2, 1), (2, 3), "muon"),
        ((2, 1), (1, 0), "soap"),
        *(
            pytest.param(before, after, name, marks=SLOW)
            for before, after in (((2, 1), (1, 0)), ((2, 2), (4, 2)), ((2, 1), (2, 3)))
            for name in OPTIMIZERS
        ),
    ],
)
def test_a_run_resumes_in_another_layout(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, name: str
) -> None:
    """The losses of the next 24 steps."""
    full, resumed = (
        run_of(tmp_path / directory, layout, name, 28)
        for directory, layout in (("full", before), ("resumed", after))
    )
    assert both(pools, full, resumed, before, after) < 2e-5
    sums = [
        state_sums(directory)
        for directory in (checkpoint(full, 4) / "net", resumed.run_dir / "resumed/net")
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-9)
    assert all(sums[0].values())
    if name == "muon":
        planned = plan_optimizer(SavedEngine(checkpoint(full, 4) / "net")).tensors
        assert any("momentum_buffer" in key for key in planned)


def state_sums(directory: Path) -> dict[str, float]:
    """The sum of squares of each kind of state, over all ranks, without padding."""
    sums: dict[str, float] = {}
    for flat in (flat for rank in SavedEngine(directory).flats for flat in rank):
        for key, value in materialize(flat.state).items():
            if getattr(value, "ndim", 0):
                sums[key] = sums.get(key, 0.0) + float(value.double().square().sum())
    return sums


def test_what_depends_on_shapes_is_not_converted_and_must_not_change(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    full = run_of(tmp_path / "full", (2, 1), "soap", 4, heads={"first.weight": 2})
    two_ranks.run(run_in_world, full)
    with pytest.raises(CheckpointError, match="cannot be resharded or converted"):
        plan_optimizer(SavedEngine(checkpoint(full, 4) / "net"))
    for stage, args, found in (
        (1, {"max_precond_dim": 5, "heads": {"first.weight": 2}}, "max_precond_dim is 5 in the"),
        (1, {"heads": {"first.weight": 4}}, "heads is 4 in the config, and 2 in the checkpoint"),
        (3, {"heads": {"first.weight": 4}}, "heads is 4 in the config, and 2 in the checkpoint"),
    ):
        changed = run_of(tmp_path / f"{stage} {len(args)}", (2, stage), "soap", 8, **args)
        copy_checkpoint(full, changed)
        for error in two_ranks.run(error_of, changed):
            assert f"optimizer.{found}" in error
