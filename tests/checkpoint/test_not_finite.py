"""Weights that are not finite: known in the manifest, and never in place of a good checkpoint."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import distributed
from harness.checkpoint.inspect import describe_path
from harness.checkpoint.manifest import read_manifest
from harness.config import Config
from harness.convert.convert import Options, convert
from harness.convert.run_checkpoints import checkpoints_in
from harness.errors import HarnessError, NonFiniteError
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.trainer import Trainer
from harness.zero.engine_state import base_optimizer
from tests.support.helpers import Pools, checkpoint, error_of, log_text, tiny_config


def poison(ds: Any) -> None:
    """Makes one master weight NaN."""
    groups = getattr(ds.optimizer, "fp32_partitioned_groups_flat", None)
    masters = groups or [p for group in base_optimizer(ds).param_groups for p in group["params"]]
    with torch.no_grad():
        masters[-1].view(-1)[0] = torch.nan


def poisoned_at(config: Config, step: int, rank: int) -> None:
    """A run in which one rank's weights are not finite after a step."""
    take_step = Trainer.step

    def and_poison(self: Trainer) -> None:
        take_step(self)
        if self.engines.global_step == step and distributed.global_rank() == rank:
            poison(self.engines["net"].ds)

    with pytest.MonkeyPatch.context() as patch, suppress(NonFiniteError):
        patch.setattr(Trainer, "step", and_poison)
        run_in_world(config)


def train_in_used_memory(config: Config) -> None:
    """A run whose new tensors are NaN until they are written."""
    torch.use_deterministic_algorithms(True)  # fills them
    try:
        assert torch.empty(1).isnan()
        run_in_world(config)
    finally:
        torch.use_deterministic_algorithms(False)


BF16 = {"ds_overrides": {"bf16": {"enabled": True}}}


@pytest.mark.parametrize(
    "stage", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 2))]
)
@pytest.mark.parametrize("engine", [{}, BF16], ids=str)
def test_what_memory_held_is_not_in_the_weights(
    pools: Pools, tmp_path: Path, stage: int, engine: dict[str, Any]
) -> None:
    """DeepSpeed leaves it in the padding of stage 3's shards: on 3 ranks all have some."""
    configs = [
        tiny_config(tmp_path, stage, run={"steps": 3, "name": name}, engines={"net": engine})
        for name in ("new", "used")
    ]
    for config, train in zip(configs, (run_in_world, train_in_used_memory), strict=True):
        pools(3).run(train, config)
        assert read_manifest(checkpoint(config, 3)).finite
        convert(config.run_dir, config.run_dir / "x.sft", Options(), lambda _: None)
    new, used = (load_file(config.run_dir / "x.sft") for config in configs)
    assert new.keys() == used.keys()
    assert all(torch.equal(new[name], used[name]) for name in new)


@pytest.mark.parametrize(
    ("stage", "engine", "background"),
    [
        (0, {}, False),
        (1, {}, True),
        (2, {}, False),
        (3, {}, False),
        (0, BF16, True),
        (3, BF16, True),
    ],
)
def test_the_last_finite_checkpoint_stays(
    two_ranks: RankPool, tmp_path: Path, stage: int, engine: dict[str, Any], background: bool
) -> None:
    config = tiny_config(
        tmp_path,
        stage,
        engines={"net": engine},
        trainer={"save_every": 1, "export_at_end": False},
        checkpoint={"keep_last": 2, "background": background},
    )
    two_ranks.run(poisoned_at, config, 3, 1)
    left = [read_manifest(path) for path in checkpoints_in(config.run_dir / "checkpoints")]
    assert [(manifest.step, manifest.finite) for manifest in left] == [
        (6, False),
        (2, True),
        (1, True),
    ]
    assert (config.run_dir / "checkpoints/latest").read_text() == "step-00000002\n"
    text = log_text(config)
    assert text.count("its weights are not finite: it does not count as a good one") == 4


def test_only_who_asks_resumes_from_weights_that_are_not_finite(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    def run(**table: Any) -> Config:
        return tiny_config(tmp_path, run={"steps": 2} | table, trainer={"save_every": 1})

    two_ranks.run(poisoned_at, run(), 2, 0)
    first, second = (checkpoint(run(), step) for step in (1, 2))
    assert "  its weights are not finite" in describe_path(second)
    two_ranks.run(error_of, run(resume=str(second)))
    asked = log_text(run())
    assert f"resumed from {second}\n" in asked
    assert f"{second}: its weights are not finite: to resume from an earlier" in asked
    two_ranks.run(run_in_world, run())
    text = log_text(run()).removeprefix(asked)
    assert f"skipped: {second}: its weights are not finite: to resume from it, set run" in text
    assert f"resumed from {first}\n" in text
    assert read_manifest(second).finite  # trained again
    lines: list[str] = []
    two_ranks.run(poisoned_at, run(name="only", steps=1), 1, 0)
    only = run(name="only")
    assert "its weights are not finite" in two_ranks.run(error_of, only)[0]
    with pytest.raises(HarnessError, match="its weights are not finite"):
        convert(only.run_dir, tmp_path / "x.sft", Options(), lines.append)
