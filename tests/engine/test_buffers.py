"""Buffers that training changes: as under torch's DDP, or each rank's own; resumed to the bit."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.checkpoint.save import rank_file
from harness.config import Config
from harness.config.sections import merge
from harness.engine.buffers import content_of
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.run import run_in_world
from harness.testing.pool import RankError, RankPool
from tests.support import plain_ddp
from tests.support.helpers import (
    ROOT,
    Pools,
    checkpoint,
    exported,
    log_text,
    losses,
    records,
    tensor_crcs,
    tiny_config,
    without_times,
)
from tests.support.quick import quick

TASK = str(ROOT / "tests/tasks/buffers_task.py")
STAGES = [0, 1, 2, 3]
BF16 = {"ds_overrides": {"bf16": {"enabled": True}}}
KEEP_NONE: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def config_of(
    directory: Path, kind: str, stage: int = 1, engine: Any = None, **overrides: Any
) -> Config:
    """A run of 12 steps, evaluated and saved every 6."""
    optimizer = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.01}
    table = {
        "run": {"steps": 12},
        "task": {"path": TASK, "args": {"kind": kind}},
        "engines": {"net": merge({"optimizer": optimizer}, engine or {})},
        "trainer": {"eval_every": 6, "save_every": 6},
    }
    return tiny_config(directory, stage, **merge(table, overrides))


def outcome(config: Config) -> list[Any]:
    """Records and evaluations of a run, and the CRCs of all tensors in its last checkpoint."""
    last = checkpoint(config, config.run.steps)
    crcs = {path.name: tensor_crcs(path) for path in last.rglob("*.pt")}
    return [*(without_times(records(config, kind)) for kind in ("", "eval/")), crcs]


def both(pool: RankPool, config: Config) -> tuple[list[Any], list[Any]]:
    """The outcomes of a run, and of the same resumed from its step 6."""
    pool.run(run_in_world, config)
    first = outcome(config)
    shutil.rmtree(checkpoint(config, config.run.steps))
    pool.run(run_in_world, config)
    assert "resumed from" in log_text(config)
    return first, outcome(config)


def saved_buffers(config: Config, rank: int, step: int = 12) -> dict[str, Any]:
    """What a rank's own file in a checkpoint has of the engine's buffers."""
    state = torch.load(checkpoint(config, step) / rank_file(rank), weights_only=True)
    return state["engines"]["engines"]["net"]["buffers"]


@pytest.mark.parametrize(
    ("kind", "stage", "accumulation"),
    quick(
        [("norm", 0, 1), ("norm", 3, 2), ("codes", 0, 2), ("codes", 1, 1), ("codes", 2, 2)],
        ("norm", 0, 1),
        ("norm", 3, 2),
        ("codes", 2, 2),
    ),
)
def test_synced_buffers_equal_those_under_ddp(
    two_ranks: RankPool, tmp_path: Path, kind: str, stage: int, accumulation: int
) -> None:
    keys = {"gradient_accumulation_steps": accumulation, **KEEP_NONE}
    config = config_of(tmp_path, kind, stage, {"ds_overrides": keys})
    two_ranks.run(run_in_world, config)
    expected, evaluation, state = two_ranks.run(plain_ddp.train, config)[0]
    assert losses(config) == pytest.approx(expected, abs=1e-5)
    assert records(config, "eval/")[-1]["eval/loss"] == pytest.approx(evaluation, abs=1e-5)
    torch.testing.assert_close(exported(config), state, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "stage", "dtype", "mode"),
    quick(
        [
            (*case, mode)
            for case in (
                ("norm", 2, {}),
                ("codes", 0, {}),
                ("codes", 1, {}),
                ("codes", 2, BF16),
                ("codes", 3, {}),
                ("mixed", 3, {}),
            )
            for mode in ("sync", "own")
        ],
        ("norm", 2, {}, "own"),
        ("codes", 0, {}, "sync"),
        ("codes", 1, {}, "own"),
        ("codes", 2, BF16, "sync"),
        ("codes", 3, {}, "own"),
        ("mixed", 3, {}, "sync"),
    ),
    ids=str,
)
def test_a_resumed_run_is_bit_identical(
    two_ranks: RankPool, tmp_path: Path, kind: str, stage: int, dtype: Any, mode: str
) -> None:
    config = config_of(tmp_path, kind, stage, {"buffers": mode} | dtype)
    first, second = both(two_ranks, config)
    assert first == second
    if (kind, mode, dtype) == ("codes", "own", {}):
        assert losses(config)[6:9] == pytest.approx([8.2602, 11.6949, 9.9401], abs=1e-4)
    ours, theirs = (saved_buffers(config, rank) for rank in (0, 1))
    assert ours["changed"] == theirs["changed"] != []
    if mode == "own":
        assert "evaluates with each rank's own buffers: " in log_text(config)
        assert "exports rank 0's own buffers: " in log_text(config)
        assert any(not torch.equal(v, theirs["values"][n]) for n, v in ours["values"].items())
    else:
        assert all(torch.equal(v, theirs["values"][n]) for n, v in ours["values"].items())
        assert kind == "mixed" or ours["values"] == {}


def traced(config: Config) -> list[dict[str, Any]]:
    """A run; every buffer at the beginning of every step, and how many broadcasts DeepSpeed and
    harness took since the step before."""
    steps: list[dict[str, Any]] = []
    counted = 0

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted += 1
        return broadcast(*args, **kwargs)

    def record(engines: Engines, *args: Any) -> Any:
        nonlocal counted
        values = {
            f"{engine.name}.{name}": tensor.clone()
            for engine in engines.values()
            for name, tensor in engine.module.named_buffers()
        }
        steps.append(values | {"broadcasts": torch.tensor(counted)})
        counted = 0
        return step(engines, *args)

    step, broadcast = Engines.step, dist.broadcast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engines, "step", record)
        patch.setattr(dist, "broadcast", count)
        run_in_world(config)
    return steps


def different(pool: RankPool, config: Config) -> tuple[list[set[str]], list[list[int]]]:
    """Which buffers differ between the ranks at each step, and the broadcasts of each rank."""
    ours, theirs = pool.run(traced, config)
    names = [
        {n for n in a | b if n not in a or n not in b or not torch.equal(a[n], b[n])}
        for a, b in zip(ours, theirs, strict=True)
    ]
    return names, [[int(step["broadcasts"]) for step in steps] for steps in (ours, theirs)]


NONE: dict[str, Any] = {"trainer": {"eval_every": 0, "save_every": 0}}


def test_all_kinds_of_buffers_are_synced_in_one_broadcast_a_step(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = config_of(tmp_path, "mixed", 3, {"ds_overrides": KEEP_NONE}, **NONE)
    found, broadcasts = different(two_ranks, config)
    # The lazy one is known after its first step; a cache stays each rank's own.
    assert found == [set(), {"net.cache", "net.lazy"}, *[{"net.cache"}] * 10]
    names = "calls, hidden, mean, replaced, seen"
    assert f"training changes 5 buffers ({names}): rank 0's before every step" in log_text(config)
    assert "training changes 1 buffer (late_mean)" in log_text(config)
    assert "(late_mean): began to change in one of the last 2 steps" in log_text(config)
    assert log_text(config).count("began to change") == 1
    engine = {"ds_overrides": KEEP_NONE, "buffers": "own"}
    own = config_of(tmp_path / "own", "mixed", 3, engine, **NONE)
    _, without = different(two_ranks, own)
    for more, less in zip(broadcasts, without, strict=True):  # DeepSpeed takes some at the start
        assert [a - b for a, b in zip(more, less, strict=True)] == [0] + [1] * 11
    assert "net.cache" not in saved_buffers(own, 1)["changed"]


def test_saves_and_evaluations_change_nothing(two_ranks: RankPool, tmp_path: Path) -> None:
    config = config_of(tmp_path / "every", "codes", trainer={"eval_every": 1, "save_every": 1})
    without = config_of(tmp_path / "none", "codes", **NONE)
    two_ranks.run(run_in_world, config)
    two_ranks.run(run_in_world, without)
    assert losses(config) == losses(without)


def test_every_rank_starts_with_rank_0s(two_ranks: RankPool, tmp_path: Path) -> None:
    config = config_of(tmp_path, "mixed", task={"args": {"differs": True}}, **NONE)
    assert "net.fixed" not in set().union(*different(two_ranks, config)[0])
    assert "take rank 0's: 1 buffer (fixed)" in log_text(config)
    own = config_of(
        tmp_path / "own", "mixed", 1, {"buffers": "own"}, **config.model_dump(include={"task"})
    )
    assert all("net.fixed" in names for names in different(two_ranks, own)[0])


def test_the_buffers_of_all_engines_are_in_one_broadcast(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    net = config_of(tmp_path, "codes").model_dump()["engines"]["net"]
    engines = {"net": net, "codes": net | {"train_every": 2}, "kept": net | {"buffers": "own"}}
    config = config_of(tmp_path, "codes", engines=engines, **NONE)
    found, broadcasts = different(two_ranks, config)
    assert found == [set(), *[{"kept.codes"}] * 11]
    assert [counts[1:] for counts in broadcasts] == [[1] * 11] * 2


@pytest.mark.parametrize("mode", ["sync", "own"])
def test_another_number_of_ranks_starts_with_rank_0s(
    pools: Pools, tmp_path: Path, mode: str
) -> None:
    config = config_of(tmp_path, "codes", 1, {"buffers": mode})
    pools(2).run(run_in_world, config)
    shutil.rmtree(checkpoint(config, 12))
    per_rank = pools(3).run(traced, config)
    before = saved_buffers(config, 0, 6)
    assert all(
        torch.equal(steps[0]["net.codes"], per_rank[0][0]["net.codes"]) for steps in per_rank
    )
    message = "saved on 2 ranks: every rank starts with rank 0's buffers"
    assert (message in log_text(config)) == (mode == "own")
    if mode == "own":
        assert torch.equal(per_rank[2][0]["net.codes"], before["values"]["codes"])


def run_of_before(config: Config) -> None:
    """A run whose checkpoints have only what older versions wrote."""
    state_dict = Engine.state_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Engine,
            "state_dict",
            lambda self: {k: v for k, v in state_dict(self).items() if k != "buffers"},
        )
        run_in_world(config)


def test_a_run_of_before_keeps_each_ranks_own(two_ranks: RankPool, tmp_path: Path) -> None:
    steps: dict[str, Any] = {"run": {"steps": 6}}
    two_ranks.run(run_of_before, config_of(tmp_path, "codes", 1, {"buffers": "own"}, **steps))
    shutil.copytree(tmp_path / "tiny", tmp_path / "synced/tiny")
    config = config_of(tmp_path, "codes")
    two_ranks.run(run_in_world, config)
    assert losses(config)[6:9] == pytest.approx([8.1310, 11.7825, 10.3444], abs=1e-4)  # as before
    assert "every rank starts with rank 0's buffers, and keeps its own, as before" in log_text(
        config
    )
    first = outcome(config)
    assert [saved_buffers(config, rank)["mode"] for rank in (0, 1)] == ["own", "own"]
    longer = config_of(tmp_path, "codes", run={"steps": 14})
    two_ranks.run(run_in_world, longer)
    assert saved_buffers(longer, 1, 14)["mode"] == "own"
    assert first != outcome(longer)
    synced = config_of(tmp_path / "synced", "codes", 1, {"buffers": "sync"})
    found, _ = different(two_ranks, synced)
    assert found[2:] == [set()] * 4  # the steps from 9 on


def test_it_can_be_changed_at_a_resume(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(
        run_in_world, config_of(tmp_path, "codes", 1, {"buffers": "own"}, run={"steps": 6})
    )
    shutil.copytree(tmp_path / "tiny", tmp_path / "default/tiny")
    default = config_of(tmp_path / "default", "codes")
    assert all(different(two_ranks, default)[0])
    synced = config_of(tmp_path, "codes", 1, {"buffers": "sync"})
    assert not any(different(two_ranks, synced)[0])
    assert losses(synced)[6:9] != losses(default)[6:9]


def test_a_synced_buffer_that_grows_is_an_error(two_ranks: RankPool, tmp_path: Path) -> None:
    config = config_of(tmp_path, "codes", task={"args": {"grows": 4}}, **NONE)
    expected = (
        r"rank 1: .*engine 'net': buffer 'codes' is broadcast before every step, and was float32 "
        r"\[6, 8\]; now it is float32 \[7, 8\]: set engines.net.buffers = 'own'"
    )
    with pytest.raises(RankError, match=re.compile(expected, re.DOTALL)):
        two_ranks.run(run_in_world, config)


def test_a_buffer_may_repeat_one_element() -> None:
    found = content_of(torch.ones(1).expand(2, 3))
    assert found == content_of(torch.ones(2, 3)) != content_of(torch.zeros(2, 3))
