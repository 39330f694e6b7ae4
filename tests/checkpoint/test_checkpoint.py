"""Saving, resuming and refusing: what `runs/NAME/checkpoints/` holds, and what is done with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint.manifest import checkpoints_in
from harness.config import Config
from harness.config.sections import merge
from harness.engine import engines as engines_module
from harness.files import json_read
from harness.io import load
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import OFFLOAD, error_of, losses, records, tiny_config


def exported(config: Config, step: int) -> dict[str, torch.Tensor]:
    return load(config.run_dir / f"exports/step-{step:08d}/net.sft")


def checkpoint(config: Config, step: int) -> Path:
    return config.run_dir / f"checkpoints/step-{step:08d}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "overrides"),
    [(0, {}), (1, {}), (2, {}), (3, {}), (1, OFFLOAD), (2, OFFLOAD), (3, OFFLOAD)],
    ids=["0", "1", "2", "3", "1 offload", "2 offload", "3 offload"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    two_ranks: RankPool, tmp_path: Path, stage: int, overrides: Any, dtype: str
) -> None:
    ours = {"bf16": {"enabled": dtype == "bf16"}, "gradient_accumulation_steps": 2}
    engine: dict[str, Any] = {
        "scheduler": {"name": "cosine", "warmup": 3},
        "ds_overrides": ours | overrides,
    }
    whole = tiny_config(
        tmp_path / "whole",
        stage,
        run={"steps": 15},
        task={"args": {"dropout": 0.2}},
        engines={"net": engine},
    )
    two_ranks.run(run_in_world, whole)
    table = whole.model_dump() | {"run": whole.run.model_dump() | {"dir": tmp_path / "parts"}}
    parts = Config.model_validate(table | {"trainer": {"save_every": 7}})
    two_ranks.run(run_in_world, parts)
    shutil.rmtree(checkpoint(parts, 15))
    shutil.rmtree(checkpoint(parts, 14))
    shutil.rmtree(parts.run_dir / "exports")
    two_ranks.run(run_in_world, parts)  # from step 7, in the middle of an epoch of 6 steps
    assert losses(parts) == losses(whole)
    rates = [[record["lr"] for record in records(config)] for config in (parts, whole)]
    assert rates[0] == rates[1]
    assert records(parts)[-1]["samples"] == records(whole)[-1]["samples"] == 15 * 16
    for name, tensor in exported(whole, 15).items():
        assert torch.equal(exported(parts, 15)[name], tensor), name
    assert f"resumed from {checkpoint(parts, 7)}" in (parts.run_dir / "log.txt").read_text()


def test_a_complete_run_is_left_as_it_is(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    two_ranks.run(run_in_world, config)
    before, metrics = losses(config), (config.run_dir / "metrics.jsonl").read_text()
    two_ranks.run(run_in_world, config)
    assert (config.run_dir / "metrics.jsonl").read_text() == metrics
    assert "the run is complete" in (config.run_dir / "log.txt").read_text()
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
    whole = tiny_config(tmp_path / "whole", engines=engines)
    parts = tiny_config(tmp_path / "parts", engines=engines, trainer={"save_every": 4})
    two_ranks.run(run_in_world, whole)
    two_ranks.run(run_in_world, parts)
    shutil.rmtree(checkpoint(parts, 6))
    two_ranks.run(run_in_world, parts)
    for name in ("net/loss", "other/loss"):
        assert [r[name] for r in records(parts)] == [r[name] for r in records(whole)]


def test_an_unfinished_save_is_no_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trainer={"save_every": 2})
    two_ranks.run(run_in_world, config)
    (checkpoint(config, 6) / "manifest.json").unlink()
    checkpoint(config, 4).rename(checkpoint(config, 4).with_suffix(".tmp"))
    two_ranks.run(run_in_world, config)
    assert f"resumed from {checkpoint(config, 2)}" in (config.run_dir / "log.txt").read_text()
    assert not checkpoint(config, 4).with_suffix(".tmp").exists()


def damage_missing(directory: Path) -> str:
    (directory / "rank-00001.pt").unlink()
    return "rank-00001.pt is missing"


def damage_truncated(directory: Path) -> str:
    path = directory / "net/mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    return "net/mp_rank_00_model_states.pt has"


def damage_one_bit(directory: Path) -> str:
    path = directory / "net/mp_rank_00_model_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "net/mp_rank_00_model_states.pt"


def damage_manifest(directory: Path) -> str:
    (directory / "manifest.json").write_text('{"step"')
    return "manifest.json is damaged"


def damage_dtype(directory: Path) -> str:
    manifest = json_read(directory / "manifest.json")
    manifest["engines"]["net"]["dtype"] = "torch.float16"
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return "dtype is torch.float32 here, and torch.float16 in the checkpoint"


def damage_format(directory: Path) -> str:
    manifest = json_read(directory / "manifest.json") | {"format": 3}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return "format 3, and this version of harness reads 4"


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
def test_a_damaged_checkpoint_is_named_and_refused(
    two_ranks: RankPool, tmp_path: Path, damage: Any
) -> None:
    config = tiny_config(tmp_path)
    two_ranks.run(run_in_world, config)
    message = damage(checkpoint(config, 6))
    told = two_ranks.run(error_of, config)
    assert all(message in text and str(checkpoint(config, 6)) in text for text in told), told
    errors = (config.run_dir / "log.txt").read_text().partition(" rank 0 ERROR ")[2]
    assert message in errors


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
    told = two_ranks.run(error_of, config)
    reason = (
        f"checkpoint {checkpoint(config, 6)} does not fit this run: engine 'net': optimizer is "
        f"{found} here, and torch.optim.adamw:AdamW in the checkpoint"
    )
    assert all(text.startswith(reason) for text in told), told


def test_changed_data_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(run_in_world, tiny_config(tmp_path))
    other = tiny_config(tmp_path, task={"args": {"samples": 50}}, run={"steps": 8})
    told = two_ranks.run(error_of, other)
    assert all("other data" in text and "length is 96" in text for text in told), told


def test_starting_over_in_a_used_run_directory_is_refused(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(run_in_world, tiny_config(tmp_path))
    told = two_ranks.run(error_of, tiny_config(tmp_path, run={"resume": "none"}))
    assert all("choose another run.name" in text for text in told), told


def with_lr(config: Config, lr: float, steps: int) -> Config:
    engine = {"net": {"optimizer": {"lr": lr}}}
    table = merge(config.model_dump(), {"engines": engine, "run": {"steps": steps}})
    return Config.model_validate(table)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_config_has_the_last_word_on_the_learning_rate(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    engine = {"optimizer": {"betas": [0.9, 0.99]}, "scheduler": {"name": "constant", "warmup": 4}}
    config = tiny_config(tmp_path, stage, run={"steps": 2}, engines={"net": engine})
    two_ranks.run(run_in_world, config)
    two_ranks.run(run_in_world, with_lr(config, lr=0.5, steps=6))
    rates = [record["lr"] for record in records(config)]
    assert rates == pytest.approx([0.0025, 0.005, 0.375, 0.5, 0.5, 0.5])


def hold_lr(config: Config, lr: float) -> None:
    """A run that holds its learning rate from the first step on, as the command does."""
    make = engines_module.Engine.__init__

    def held(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.set_lr(lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines_module.Engine, "__init__", held)
        run_in_world(config)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_held_learning_rate_stays_until_the_config_changes(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = tiny_config(tmp_path, stage, run={"steps": 2})
    two_ranks.run(hold_lr, config, 0.125)
    two_ranks.run(run_in_world, with_lr(config, lr=1e-2, steps=4))
    two_ranks.run(run_in_world, with_lr(config, lr=0.25, steps=6))
    assert [record["lr"] for record in records(config)] == [0.125] * 4 + [0.25] * 2


def test_an_abandoned_branch_is_not_taken_up_again(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trainer={"save_every": 2})
    two_ranks.run(run_in_world, config)
    back = {"run": {"resume": str(checkpoint(config, 2)), "steps": 3}}
    two_ranks.run(run_in_world, Config.model_validate(merge(config.model_dump(), back)))
    assert len(losses(config)) == 3
    two_ranks.run(
        run_in_world, Config.model_validate(merge(config.model_dump(), {"run": {"steps": 8}}))
    )
    assert [record["step"] for record in records(config)] == [*range(1, 9)]


def test_a_clock_that_was_put_back_costs_no_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    keep: Any = {"trainer": {"save_every": 2}, "checkpoint": {"keep_last": 2}}
    two_ranks.run(run_in_world, tiny_config(tmp_path, run={"steps": 4}, **keep))
    config = tiny_config(tmp_path, run={"steps": 8}, **keep)
    for step in (2, 4):
        manifest = json_read(checkpoint(config, step) / "manifest.json")
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
    assert all("other data" in text for text in two_ranks.run(error_of, other))
    assert (config.run_dir / "config.toml").read_text() == before
