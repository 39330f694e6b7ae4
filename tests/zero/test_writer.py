"""`harness convert --to-zero`: plain DeepSpeed goes on at another ZeRO stage and world size."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import io
from harness.convert.convert import Options, convert
from harness.convert.resolve_source import locate
from harness.errors import HarnessError
from harness.io.stored import materialize, read
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.support.helpers import tiny_config
from tests.support.plain_deepspeed import layouts, write
from tests.support.plain_resume import go_on

BF16 = {"bf16": {"enabled": True}}
Pools = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def pools(two_ranks: RankPool) -> Iterator[Pools]:
    with RankPool(1) as one_rank:
        yield {1: one_rank, 2: two_ranks}.__getitem__


def at(stage: int, beside: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage} | zero} | (beside or {})


def assert_same_state(one: Path, other: Path) -> None:
    """Masters, moments, scalars and settings are those, by parameter."""
    found, expected = locate(one), locate(other)
    assert isinstance(found, SavedEngine) and isinstance(expected, SavedEngine)
    assert found.shapes.keys() == expected.shapes.keys()
    for name in expected.shapes:
        assert torch.equal(read(found.master(name)), read(expected.master(name))), name
        assert materialize(found.scalars(name)) == materialize(expected.scalars(name))
        assert set(found.state_keys(name)) == {"exp_avg", "exp_avg_sq"}
        for key in expected.state_keys(name):
            moment = read(found.moment(name, key))
            assert torch.equal(moment, read(expected.moment(name, key))), (name, key)
    assert materialize(found.groups) == materialize(expected.groups)
    assert found.model["mine"] == 7
    assert found.model["global_steps"] == expected.model["global_steps"]


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
def test_plain_deepspeed_goes_on(
    pools: Pools, tmp_path: Path, was: dict[str, Any], ranks: int, now: dict[str, Any]
) -> None:
    first, laid, last = tmp_path / "first", tmp_path / "laid", tmp_path / "last"
    pools(2).run(go_on, was, 3, None, first)
    expected = pools(2).run(go_on, was, 4, first)[0]
    stage = now["zero_optimization"]["stage"]
    round_robin = now["zero_optimization"].get("round_robin_gradients", False)
    told: list[str] = []
    convert(first, laid, Options(to_zero=stage, ranks=ranks, round_robin=round_robin), told.append)
    assert f"global_step3 for {ranks} ranks at ZeRO {stage}" in told[0]
    pools(ranks).run(go_on, now, 0, laid, last)
    assert_same_state(last, first)
    found = pools(ranks).run(go_on, now, 4, laid)[0]
    assert found == pytest.approx(expected, abs=2e-2 if "bf16" in was else 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_a_run_at_zero_0_is_laid_out(
    pools: Pools, tmp_path: Path, stage: int
) -> None:
    config = tiny_config(tmp_path, 0, run={"steps": 2})
    pools(2).run(run_in_world, config)
    convert(config.run_dir, tmp_path / "laid", Options(to_zero=stage, ranks=3), print)
    convert(config.run_dir, tmp_path / "was.sft", Options(), print)
    convert(tmp_path / "laid", tmp_path / "now.sft", Options(), print)
    was, now = io.load(tmp_path / "was.sft"), io.load(tmp_path / "now.sft")
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)
    laid = locate(tmp_path / "laid")
    assert isinstance(laid, SavedEngine)
    assert laid.model["shared_params"] == {"again.weight": "middle.weight"}
    assert not laid.model["frozen_param_shapes"]


def test_the_loss_scale_of_fp16_goes_along(pools: Pools, tmp_path: Path) -> None:
    pools(2).run(write, tmp_path / "first", layouts(2)["zero2 fp16"])
    convert(tmp_path / "first/here", tmp_path / "laid", Options(to_zero=3), print)
    (was,) = (tmp_path / "first/here").glob("zero_pp_rank_1_*_optim_states.pt")
    (now,) = (tmp_path / "laid").glob("*/*_optim_states.pt")
    scalers = [
        torch.load(path, weights_only=False)["optimizer_state_dict"]["loss_scaler"]
        for path in (was, now)
    ]
    assert type(scalers[0]) is type(scalers[1])
    assert vars(scalers[0]) == vars(scalers[1])
    assert vars(scalers[0])["cur_scale"] > 1


def test_what_cannot_be_laid_out_anew_is_an_error(pools: Pools, tmp_path: Path) -> None:
    first = tmp_path / "first"
    pools(2).run(go_on, at(2, round_robin_gradients=True), 1, None, first)
    for options, message in (
        (Options(to_zero=1, ranks=2), "give --round-robin true or false"),
        (Options(to_zero=1, ranks=0), "expected 1 or more"),
        (Options(to_zero=3, dtype="bf16"), "--to-zero takes no option but"),
    ):
        with pytest.raises(HarnessError, match=message):
            convert(first, tmp_path / "laid", options, print)
    with pytest.raises(HarnessError, match="is there already"):
        convert(first, first, Options(to_zero=3), print)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
