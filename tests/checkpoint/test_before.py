"""What older versions wrote keeps working: it parses, resumes where it was, reshards and converts.

tests/fixtures/README.md: how the files were made. What is trained is compared to 1e-5, as another
kind of CPU rounds sums differently.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import Config
from harness.config.load import load
from harness.convert.convert import Options, convert
from harness.io import load as load_weights
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import ROOT, Pools, exports, records, without_times

BEFORE = ROOT / "tests/fixtures/before"
RUNS = ["zero2_bf16_ema", "zero3_apollo"]


def old_run(name: str, tmp_path: Path, **overrides: Any) -> Config:
    """A copy of an old run directory, and the config of that run."""
    shutil.copytree(BEFORE / name, tmp_path / name)
    control = {"control": {"stdin": False, "socket": False}, "run": {"dir": str(tmp_path)}}
    return load(BEFORE / f"{name}.toml", control | overrides)


def expected(name: str) -> list[dict[str, Any]]:
    return json.loads((BEFORE / f"{name}.expected.json").read_text())


def assert_as_then(found: list[dict[str, Any]], then: list[dict[str, Any]]) -> None:
    """Of records. The vectors of this task's samples counted as tokens then."""
    for now, before in zip(without_times(found), without_times(then), strict=True):
        for record in (now, before):
            record.pop("tokens", None)
        assert now == pytest.approx(before, rel=1e-5)


def assert_close(found: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> None:
    assert found.keys() == then.keys()
    for name, tensor in then.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_an_older_version_resumes_where_it_was(
    two_ranks: RankPool, tmp_path: Path, name: str
) -> None:
    config = old_run(name, tmp_path)
    two_ranks.run(run_in_world, config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    resumed = [json.loads(line) for line in lines][-len(expected(name)) :]
    for added in ("skipped", "spikes"):  # metrics since then
        assert all(record.pop(added, 0) == 0 for record in resumed)
    assert_as_then(resumed, expected(name))
    assert [r["lr"] for r in resumed if r["step"] == 7] == [pytest.approx(0.001125)]  # the event
    for file in (BEFORE / f"{name}.exports").iterdir():
        assert_close(load_weights(exports(config) / file.name), load_weights(file))


@pytest.mark.parametrize("name", RUNS)
def test_it_resumes_at_another_stage_and_world_size(
    three_ranks: RankPool, tmp_path: Path, name: str
) -> None:
    stage = {"zero_optimization": {"stage": 1 if "zero3" in name else 3}}
    config = old_run(name, tmp_path, engines={"net": {"ds_overrides": stage}})
    three_ranks.run(run_in_world, config)
    assert [record["step"] for record in records(config)][-4:] == [5, 6, 7, 8]


@pytest.mark.parametrize("name", RUNS)
def test_its_resolved_config_parses(tmp_path: Path, name: str) -> None:
    config = load(BEFORE / name / "config.toml")
    assert config.run.name == name
    assert config.checkpoint.best_mode == "max"
    assert config.checkpoint.best_metric == "eval/accuracy"
    assert config.trainer.save_at_end and config.trainer.export_at_end
    assert config.engines["net"].train_every == 1
    assert config.optimizations.offload.fraction == "auto"
    assert config == load(BEFORE / f"{name}.toml")


@pytest.mark.parametrize(("name", "what"), [(RUNS[0], "all"), (RUNS[1], "weights")])
def test_its_checkpoint_converts_to_the_same_file(tmp_path: Path, name: str, what: str) -> None:
    checkpoint = BEFORE / name / "checkpoints/step-00000004"
    convert(checkpoint, tmp_path / "new.sft", Options(what=what, verify=True), print)
    assert (tmp_path / "new.sft").read_bytes() == (BEFORE / f"{name}.converted.sft").read_bytes()


# ------------------------------------------------------------------- under an older DeepSpeed
OF_0195 = "deepspeed_0195"
"""A group of 419 elements on 2 ranks at ZeRO 2: the last partition is padded."""


def test_a_run_under_an_older_deepspeed_resumes_where_it_was(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = old_run(OF_0195, tmp_path)
    two_ranks.run(run_in_world, config)
    resumed = records(config)[-4:]
    assert all(record.pop("spikes", 0) == 0 for record in resumed)  # a metric since then
    assert_as_then(resumed, expected(OF_0195))
    exported = load_weights(exports(config) / "net.sft")
    assert_close(exported, load_weights(BEFORE / f"{OF_0195}.exports/net.sft"))


def test_a_run_under_an_older_deepspeed_resumes_on_one_rank(pools: Pools, tmp_path: Path) -> None:
    config = old_run(OF_0195, tmp_path, data={"micro_batch_size": 8})
    pools(1).run(run_in_world, config)
    losses = [record["loss"] for record in records(config)[-4:]]
    assert losses == pytest.approx([record["loss"] for record in expected(OF_0195)])


def test_a_checkpoint_under_an_older_deepspeed_converts(tmp_path: Path) -> None:
    checkpoint = BEFORE / OF_0195 / "checkpoints/step-00000004"
    convert(checkpoint, tmp_path / "w.sft", Options(what="all", verify=True), print)
    found = load_weights(tmp_path / "w.sft")
    assert sum(t.numel() for n, t in found.items() if n.startswith("optimizer.exp_avg.")) == 419
