"""Weights that are not finite: known in the manifest, and never in place of a good checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import distributed
from harness.checkpoint.inspect import describe_path
from harness.checkpoint.manifest import read_manifest
from harness.config import Config
from harness.convert.run_checkpoints import checkpoints_in
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.trainer import Trainer
from harness.zero.engine_state import base_optimizer
from tests.support.helpers import checkpoint, log_text, tiny_config


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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", and_poison)
        run_in_world(config)


BF16 = {"ds_overrides": {"bf16": {"enabled": True}}}


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
        (5, False),
        (2, True),
    ]
    text = log_text(config)
    assert text.count("its weights are not finite: it does not count as a good one") == 4


def test_a_resume_from_weights_that_are_not_finite_is_logged(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, run={"steps": 1})
    two_ranks.run(poisoned_at, config, 1, 0)
    two_ranks.run(run_in_world, config)
    directory = checkpoint(config, 1)
    assert f"{directory}: its weights are not finite: to resume from" in log_text(config)
    assert "  its weights are not finite" in describe_path(directory)
