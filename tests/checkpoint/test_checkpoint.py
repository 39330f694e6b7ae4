"""Saving, resuming and refusing: `runs/NAME/checkpoints/`, and what a run does with it."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.config import Config
from harness.config.sections import merge
from harness.convert.run_checkpoints import checkpoints_in
from harness.engine import engines as engines_module
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import (
    OFFLOAD,
    assert_equal,
    checkpoint,
    error_of,
    exported,
    flip_bit,
    log_text,
    losses,
    records,
    tiny_config,
)
from tests.support.quick import quick


@pytest.mark.parametrize(
    ("stage", "offload", "dtype"),
    quick(
        [
            (*layout, dtype)
            for layout in itertools.chain(
                ((stage, False) for stage in (0, 1, 2, 3)), ((stage, True) for stage in (1, 2, 3))
            )
            for dtype in ("fp32", "bf16")
        ],
        (0, False, "fp32"),
        (1, False, "bf16"),
        (2, False, "fp32"),
        (3, False, "bf16"),
        (3, True, "fp32"),
    ),
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    two_ranks: RankPool, tmp_path: Path, stage: int, offload: bool, dtype: str
) -> None:
    ours = {"bf16": {"enabled": dtype == "bf16"}, "gradient_accumulation_steps": 2}
    engine: dict[str, Any] = {
        "scheduler": {"name": "cosine", "warmup": 3},
        "ds_overrides": ours | (OFFLOAD if offload else {}),
    }
    uninterrupted = tiny_config(
        tmp_path / "uninterrupted",
        stage,
        run={"steps": 15},
        task={"args": {"dropout": 0.2}},
        engines={"net": engine},
    )
    two_ranks.run(run_in_world, uninterrupted)
    changes = {"run": {"dir": tmp_path / "resumed"}, "trainer": {"save_every": 7}}
    resumed = Config.model_validate(merge(uninterrupted.model_dump(), changes))
    two_ranks.run(run_in_world, resumed)
    shutil.rmtree(checkpoint(resumed, 15))
    shutil.rmtree(checkpoint(resumed, 14))
    shutil.rmtree(resumed.run_dir / "exports")
    two_ranks.run(run_in_world, resumed)  # from step 7, in the middle of an epoch of 6 steps
    assert losses(resumed) == losses(uninterrupted)
    rates = [[record["lr"] for record in records(run)] for run in (resumed, uninterrupted)]
    assert rates[0] == rates[1]
    assert records(resumed)[-1]["samples"] == records(uninterrupted)[-1]["samples"] == 15 * 16
    assert_equal(exported(resumed), exported(uninterrupted))
    assert f"resumed from {checkpoint(resumed, 7)}" in log_text(resumed)


def test_a_complete_run_is_left_as_it_is(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    two_ranks.run(run_in_world, config)
    before, metrics = losses(config), (config.run_dir / "metrics.jsonl").read_text()
    two_ranks.run(run_in_world, config)
    assert (config.run_dir / "metrics.jsonl").read_text() == metrics
    assert "the run is complete" in log_text(config)
    longer = config.model_dump() | {"run": config.run.model_dump() | {"steps": 9}}
    two_ranks.run(run_in_world, Config.model_validate(longer))
    assert losses(config)[:6] == before and len(losses(config)) == 9


def test_two_engines_resume_together(two_ranks: RankPool, tmp_path: Path) -> None:
    table = tiny_config(tmp_path).engines["net"].model_dump()
    teacher = {"ds_config": table["ds_config"], "role": "teacher"}
    engines = {
        "other": table | {"ds_overrides": {"zero_optimization": {"stage": 3}}},
        "wise": teacher,
        "sharded": teacher | {"ds_overrides": {"zero_optimization": {"stage": 3}}},
    }
    uninterrupted = tiny_config(tmp_path / "uninterrupted", engines=engines)
    resumed = tiny_config(tmp_path / "resumed", engines=engines, trainer={"save_every": 4})
    two_ranks.run(run_in_world, uninterrupted)
    two_ranks.run(run_in_world, resumed)
    shutil.rmtree(checkpoint(resumed, 6))
    two_ranks.run(run_in_world, resumed)
    for name in ("net/loss", "other/loss"):
        assert [r[name] for r in records(resumed)] == [r[name] for r in records(uninterrupted)]


def test_an_unfinished_save_is_not_a_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trainer={"save_every": 2})
    two_ranks.run(run_in_world, config)
    (checkpoint(config, 6) / "manifest.json").unlink()
    checkpoint(config, 4).rename(checkpoint(config, 4).with_suffix(".tmp"))
    two_ranks.run(run_in_world, config)
    assert f"resumed from {checkpoint(config, 2)}" in log_text(config)
    assert not checkpoint(config, 4).with_suffix(".tmp").exists()


def damage_missing(directory: Path) -> str:
    (directory / "rank-00001.pt").unlink()
    return "rank-00001.pt is missing"


def damage_truncated(directory: Path) -> str:
    path = directory / "net/mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    return "net/mp_rank_00_model_states.pt: damaged: "


def damage_one_bit(directory: Path) -> str:
    flip_bit(directory / "net/mp_rank_00_model_states.pt")
    return "net/mp_rank_00_model_states.pt"


def damage_manifest(directory: Path) -> str:
    (directory / "manifest.json").write_text('{"step"')
    return "manifest.json is damaged"


def damage_dtype(directory: Path) -> str:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["engines"]["net"]["dtype"] = "torch.float16"
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return "dtype is torch.float32 in this run, and torch.float16 in the checkpoint"


def damage_format(directory: Path) -> str:
    manifest = json.loads((directory / "manifest.json").read_text()) | {"format": 3}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return "has format 3; this version of harness reads format 4: use the version that wrote it"


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_truncated,
        damage_one_bit,
        damage_manifest,
        damage_format,
        damage_dtype,
    ],
)
def test_a_damaged_checkpoint_is_reported_and_refused(
    two_ranks: RankPool, tmp_path: Path, damage: Any
) -> None:
    config = tiny_config(tmp_path)
    two_ranks.run(run_in_world, config)
    message = damage(checkpoint(config, 6))
    errors = two_ranks.run(error_of, config)
    assert all(message in text and str(checkpoint(config, 6)) in text for text in errors), errors
    assert message in log_text(config).partition(" rank 0 ERROR ")[2]


@pytest.mark.parametrize(
    ("stage", "other", "found"),
    [
        (0, {"name": "torch.optim:SGD"}, "torch.optim.sgd:SGD"),
        (2, {"name": "torch.optim:Adafactor"}, "torch.optim:Adafactor"),
        (3, {"name": "torch.optim:SGD"}, "torch.optim.sgd:SGD"),
    ],
)
def test_another_optimizer_is_refused(
    two_ranks: RankPool, tmp_path: Path, stage: int, other: Any, found: str
) -> None:
    two_ranks.run(run_in_world, tiny_config(tmp_path, stage))
    config = tiny_config(tmp_path, stage, engines={"net": {"optimizer": other}}, run={"steps": 8})
    errors = two_ranks.run(error_of, config)
    reason = (
        f"checkpoint {checkpoint(config, 6)} does not match this run: engine 'net': optimizer is "
        f"{found} in this run, and torch.optim.adamw:AdamW in the checkpoint"
    )
    assert all(text.startswith(reason) for text in errors), errors


def test_changed_data_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(run_in_world, tiny_config(tmp_path))
    other = tiny_config(tmp_path, task={"args": {"samples": 50}}, run={"steps": 8})
    errors = two_ranks.run(error_of, other)
    assert all("the data has changed" in text and "length is 96" in text for text in errors), errors
    assert all("with engines.NAME.init_from to begin" in text for text in errors)


def test_starting_over_in_a_used_run_directory_is_refused(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(run_in_world, tiny_config(tmp_path))
    errors = two_ranks.run(error_of, tiny_config(tmp_path, run={"resume": "none"}))
    assert all("choose another run.name" in text for text in errors), errors


def with_lr(config: Config, lr: float, steps: int) -> Config:
    engine = {"net": {"optimizer": {"lr": lr}}}
    table = merge(config.model_dump(), {"engines": engine, "run": {"steps": steps}})
    return Config.model_validate(table)


@pytest.mark.parametrize("stage", quick([0, 1, 2, 3], 1, 3))
def test_the_config_takes_precedence_on_the_learning_rate(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    engine = {"optimizer": {"betas": [0.9, 0.99]}, "scheduler": {"name": "constant", "warmup": 4}}
    config = tiny_config(tmp_path, stage, run={"steps": 2}, engines={"net": engine})
    two_ranks.run(run_in_world, config)
    two_ranks.run(run_in_world, with_lr(config, lr=0.5, steps=6))
    rates = [record["lr"] for record in records(config)]
    assert rates == pytest.approx([0.0025, 0.005, 0.375, 0.5, 0.5, 0.5])


def hold_lr(config: Config, lr: float) -> None:
    """A run that holds its learning rate from the first step on, as the command `lr` does."""
    make = engines_module.Engine.__init__

    def held(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.overrides.set_lr(lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines_module.Engine, "__init__", held)
        run_in_world(config)


@pytest.mark.parametrize("stage", quick([0, 1, 2, 3], 0, 3))
def test_a_held_learning_rate_stays_until_the_config_changes(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = tiny_config(tmp_path, stage, run={"steps": 2})
    two_ranks.run(hold_lr, config, 0.125)
    two_ranks.run(run_in_world, with_lr(config, lr=1e-2, steps=4))
    two_ranks.run(run_in_world, with_lr(config, lr=0.25, steps=6))
    assert [record["lr"] for record in records(config)] == [0.125] * 4 + [0.25] * 2


def test_an_abandoned_branch_is_not_resumed(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trainer={"save_every": 2})
    two_ranks.run(run_in_world, config)
    back = {"run": {"resume": str(checkpoint(config, 2)), "steps": 3}}
    two_ranks.run(run_in_world, Config.model_validate(merge(config.model_dump(), back)))
    assert len(losses(config)) == 3
    two_ranks.run(
        run_in_world, Config.model_validate(merge(config.model_dump(), {"run": {"steps": 8}}))
    )
    assert [record["step"] for record in records(config)] == [*range(1, 9)]


def test_a_clock_that_was_set_back_costs_no_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    keep: Any = {"trainer": {"save_every": 2}, "checkpoint": {"keep_last": 2}}
    two_ranks.run(run_in_world, tiny_config(tmp_path, run={"steps": 4}, **keep))
    config = tiny_config(tmp_path, run={"steps": 8}, **keep)
    for step in (2, 4):
        manifest = json.loads((checkpoint(config, step) / "manifest.json").read_text())
        manifest["saved_at"] += 86400
        (checkpoint(config, step) / "manifest.json").write_text(json.dumps(manifest))
    two_ranks.run(run_in_world, config)
    parent = config.run_dir / "checkpoints"
    assert checkpoints_in(parent) == [checkpoint(config, 8), checkpoint(config, 6)]
    assert (parent / "latest").read_text() == "step-00000008\n"


def test_a_refused_resume_leaves_the_config_as_it_was(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    two_ranks.run(run_in_world, config)
    before = (config.run_dir / "config.toml").read_text()
    other = tiny_config(tmp_path, data={"sampler": "pool"}, run={"steps": 9})
    assert all("the data has changed" in text for text in two_ranks.run(error_of, other))
    assert (config.run_dir / "config.toml").read_text() == before
