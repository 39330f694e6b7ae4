"""`harness convert --to-zero`: plain DeepSpeed resumes at another ZeRO stage and world size."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import io
from harness.convert.convert import Options, convert
from harness.convert.resolve_source import resolve_source
from harness.errors import HarnessError, counted
from harness.run import run_in_world
from harness.zero.reader import SavedEngine
from tests.support.helpers import Pools, assert_equal, assert_same_optimizer, tiny_config
from tests.support.plain_deepspeed import layouts, write
from tests.support.plain_resume import train

BF16 = {"bf16": {"enabled": True}}


def at(stage: int, beside: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage} | zero} | (beside or {})


def saved(path: Path) -> SavedEngine:
    engine = resolve_source(path)
    assert isinstance(engine, SavedEngine)
    return engine


@pytest.mark.parametrize(
    ("was", "ranks", "now"),
    [
        (at(2), 1, at(3)),
        (at(3), 2, at(1)),
        (at(2, round_robin_gradients=True), 1, at(1)),
        (at(3, sub_group_size=50), 2, at(2, round_robin_gradients=True)),
        (at(2, BF16, round_robin_gradients=True), 2, at(3, BF16)),
        (at(1, BF16), 1, at(2, BF16)),
        (at(2, sub_group_size=50), 2, at(3, sub_group_size=50)),
    ],
    ids=str,
)
def test_plain_deepspeed_resumes(
    pools: Pools, tmp_path: Path, was: dict[str, Any], ranks: int, now: dict[str, Any]
) -> None:
    first, resharded, last = tmp_path / "first", tmp_path / "resharded", tmp_path / "last"
    pools(2).run(train, was, 3, None, first)
    expected = pools(2).run(train, was, 4, first)[0]
    stage = now["zero_optimization"]["stage"]
    round_robin = now["zero_optimization"].get("round_robin_gradients", False)
    lines: list[str] = []
    options = Options(to_zero=stage, ranks=ranks, round_robin=round_robin)
    convert(first, resharded, options, lines.append)
    assert f"global_step3 for {counted(ranks, 'rank')} at ZeRO {stage}" in lines[1]
    pools(ranks).run(train, now, 0, resharded, last)
    assert_same_optimizer(saved(last), saved(first))
    keys = [set(saved(last).state_keys(name)) for name in saved(last).shapes]
    assert all(found == {"exp_avg", "exp_avg_sq"} for found in keys)
    assert saved(last).model["note"] == 7
    assert saved(last).model["global_steps"] == saved(first).model["global_steps"]
    found = pools(ranks).run(train, now, 4, resharded)[0]
    assert found == pytest.approx(expected, abs=2e-2 if "bf16" in was else 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_a_run_at_zero_0_is_resharded(
    pools: Pools, tmp_path: Path, stage: int
) -> None:
    config = tiny_config(tmp_path, 0, run={"steps": 2})
    pools(2).run(run_in_world, config)
    convert(config.run_dir, tmp_path / "resharded", Options(to_zero=stage, ranks=3), print)
    convert(config.run_dir, tmp_path / "was.sft", Options(), print)
    convert(tmp_path / "resharded", tmp_path / "now.sft", Options(), print)
    assert_equal(io.load(tmp_path / "now.sft"), io.load(tmp_path / "was.sft"))
    resharded = saved(tmp_path / "resharded")
    assert resharded.model["shared_params"] == {"again.weight": "middle.weight"}
    assert not resharded.model["frozen_param_shapes"]


def test_the_loss_scale_of_fp16_is_kept(pools: Pools, tmp_path: Path) -> None:
    pools(2).run(write, tmp_path / "first", layouts(2)["zero2 fp16"])
    convert(tmp_path / "first/here", tmp_path / "resharded", Options(to_zero=3), print)
    (was,) = (tmp_path / "first/here").glob("zero_pp_rank_1_*_optim_states.pt")
    (now,) = (tmp_path / "resharded").glob("*/*_optim_states.pt")
    scalers = [
        torch.load(path, weights_only=False)["optimizer_state_dict"]["loss_scaler"]
        for path in (was, now)
    ]
    assert type(scalers[0]) is type(scalers[1])
    assert vars(scalers[0]) == vars(scalers[1])
    assert vars(scalers[0])["cur_scale"] > 1


def test_what_cannot_be_resharded_is_an_error(pools: Pools, tmp_path: Path) -> None:
    first = tmp_path / "first"
    pools(2).run(train, at(2, round_robin_gradients=True), 1, None, first)
    for options, message in (
        (Options(to_zero=1, ranks=2), "pass --round-robin true or false"),
        (Options(to_zero=1, ranks=0), "expected an integer >= 1"),
        (Options(to_zero=3, dtype="bf16"), "--to-zero can only be combined with"),
    ):
        with pytest.raises(HarnessError, match=message):
            convert(first, tmp_path / "resharded", options, print)
    with pytest.raises(HarnessError, match="already exists"):
        convert(first, first, Options(to_zero=3), print)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
