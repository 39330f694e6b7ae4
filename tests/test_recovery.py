"""Steps that are not finite, or spikes: skipped, the end of the run, or a rollback."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint.manifest import read_manifest
from harness.checkpoint.save import rank_file
from harness.checkpoint.written import write_file
from harness.config import Config
from harness.config.sections import merge
from harness.convert.run_checkpoints import checkpoints_in
from harness.errors import HarnessError
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.support.helpers import (
    ROOT,
    Pools,
    assert_equal,
    assert_same_optimizer,
    checkpoint,
    exported,
    log_text,
    losses,
    records,
    tensor_crcs,
    tiny_config,
    without_times,
)

SLOW = pytest.mark.slow
TASK = str(ROOT / "tests/tasks/unstable_task.py")
OPTIMIZERS: dict[str, Any] = {
    "adamw": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "apollo": {"name": "apollo", "lr": 1e-2, "rank": 4},
}


def layouts(*quick: Any) -> list[Any]:
    """All of stage, dtype and optimizer; all but `quick` slow."""
    every = itertools.product(range(4), ("fp32", "bf16"), OPTIMIZERS)
    return [pytest.param(*each, marks=[] if each in quick else SLOW) for each in every]


def config_of(
    directory: Path,
    stage: int = 1,
    dtype: str = "fp32",
    optimizer: str = "adamw",
    args: Any = None,
    **overrides: Any,
) -> Config:
    """A run of 10 steps in the order of the data, saved every second step."""
    zero = {"stage3_param_persistence_threshold": 0}
    engine = {
        "ds_overrides": {"bf16": {"enabled": dtype == "bf16"}, "zero_optimization": zero},
        "optimizer": OPTIMIZERS[optimizer],
        "scheduler": {"name": "linear", "warmup": 3},
        "ema_decay": 0.8,
        "buffer_dtype": "model",
    }
    table = {
        "run": {"steps": 10},
        "task": {"path": TASK, "args": args or {}},
        "engines": {"net": engine},
        "data": {"sampler": "ordered", "micro_batch_size": 4},
        "trainer": {"save_every": 2},
    }
    config = tiny_config(directory, stage)
    table = merge(merge(config.model_dump(exclude={"engines"}), table), overrides)
    table["engines"] = {
        name: merge({"ds_config": config.engines["net"].ds_config}, each)
        for name, each in table["engines"].items()
    }
    return Config.model_validate(table)


def assert_same_end(found: Config, expected: Config) -> None:
    """The same weights, buffers, EMA and optimizer state after the last step, to the bit."""
    assert_equal(exported(found), exported(expected))
    ours, theirs = (checkpoint(config, config.run.steps) for config in (found, expected))
    for path in ours.glob("net/*.pt"):
        if "rank_1" not in path.name:  # at stage 3 the last shards end with padding
            assert tensor_crcs(path) == tensor_crcs(theirs / "net" / path.name)
    if "apollo" not in str(found.engines["net"].optimizer):
        assert_same_optimizer(SavedEngine(ours / "net"), SavedEngine(theirs / "net"))
    states = [torch.load(c / rank_file(1), weights_only=True) for c in (ours, theirs)]
    buffers = [state["engines"]["engines"]["net"]["buffers"]["values"] for state in states]
    assert "calls" in buffers[0] and torch.equal(buffers[0]["calls"], buffers[1]["calls"])


def skip_in_checkpoint(config: Config, before: int, after: int) -> None:
    """Makes the checkpoint of step `after` what it is if the steps since `before` were not taken:
    all of `before`, but the random generators, the data position and the counters."""
    old, new = checkpoint(config, before), checkpoint(config, after)
    files = read_manifest(old).files

    def skip(rank: int, state: Any) -> None:
        earlier = torch.load(old / rank_file(rank), weights_only=True)["engines"]["engines"]["net"]
        later = state["engines"]["engines"]
        later["net"] = earlier | {"counters": later["net"]["counters"]}

    for path in old.glob("net/*"):
        (new / "net" / path.name).write_bytes(path.read_bytes())
    edit_checkpoint(new, skip, files)


def edit_checkpoint(directory: Path, edit: Callable[[int, Any], None], files: Any = None) -> None:
    """Changes the ranks' own files in a checkpoint; `files`: of the others, if these were."""
    manifest = read_manifest(directory)
    files = dict(files or manifest.files)
    for rank in range(2):
        name = rank_file(rank)
        state = torch.load(directory / name, weights_only=True)
        edit(rank, state)
        files[name] = replace(write_file(state, directory / name), rank=rank)
    replace(manifest, files=files).write(directory)


@pytest.mark.parametrize(("stage", "dtype", "optimizer"), layouts((0, "fp32", "apollo")))
def test_a_skipped_step_changes_nothing(
    two_ranks: RankPool, tmp_path: Path, stage: int, dtype: str, optimizer: str
) -> None:
    """Of the first steps, and of some in between: to the bit as if there were none."""
    layout = stage, dtype, optimizer
    config = config_of(tmp_path / "skipping", *layout, args={"steps": [5, 6]})
    reference = config_of(tmp_path / "reference", *layout, run={"steps": 6})
    two_ranks.run(run_in_world, config)
    two_ranks.run(run_in_world, reference)
    skip_in_checkpoint(reference, 4, 6)
    reference = config_of(tmp_path / "reference", *layout)
    two_ranks.run(run_in_world, reference)
    assert_same_end(config, reference)
    assert [record["skipped"] for record in records(config)] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]
    for step, count in ((5, 1), (6, 2)):
        text = f"step {step}: engine net: skipped, as its gradients are not finite ({count} so far)"
        assert log_text(config).count(f"{text}: the loss of rank 1 is not finite\n") == 1


def ending(config: Config) -> tuple[str, int, bool]:
    """The error that ends a run, its exit code, and whether all ranks know it."""
    try:
        run_in_world(config)
    except HarnessError as error:
        return str(error), error.code, error.on_all_ranks
    return "", 0, False


SKIPPED = "engine 'net': skipped, as its gradients are not finite"
NOT_TRAINING = "the run has ended, but engine 'net' does not train: its last"


@pytest.mark.parametrize(
    ("stage", "steps", "health", "error", "ends_at"),
    [
        pytest.param(
            *(0, [3, 5], {"nonfinite": "stop"}),
            *(f"step 3: {SKIPPED} (health.nonfinite = 'stop')", 3),
            marks=SLOW,
        ),
        (
            2,
            [2, 4, 5, 6, 7],
            {"most_skipped": 3},
            f"step 6: {SKIPPED}, the last 3 steps in a row (health.most_skipped = 3)",
            6,
        ),
        (3, [4, 9, 10], {}, f"{NOT_TRAINING} 2 steps were skipped", 10),
        pytest.param(1, [9], {}, "", 10, marks=SLOW),
    ],
)
def test_a_run_that_does_not_train_ends(
    two_ranks: RankPool,
    tmp_path: Path,
    stage: int,
    steps: list[int],
    health: Any,
    error: str,
    ends_at: int,
) -> None:
    """And what is saved is good: the steps change nothing."""
    config = config_of(tmp_path, stage, args={"steps": steps}, health=health)
    assert two_ranks.run(ending, config) == [(error, 2 if error else 0, bool(error))] * 2
    saved = checkpoints_in(config.run_dir / "checkpoints")[0]
    manifest = read_manifest(saved)
    assert (manifest.step, manifest.finite) == (ends_at, True)
    reason = error.partition(" (")[0]
    assert manifest.note == (f"saved as the run ended: {reason}" if ends_at < 10 else "")
    assert [record["step"] for record in records(config)] == list(range(1, ends_at + 1))
    assert records(config)[-1]["skipped"] == len([step for step in steps if step <= ends_at])
    if ends_at == 10:  # the launcher must not take it for complete the next time either
        assert two_ranks.run(ending, config)[0][0] == error
    if error and ends_at < 10:
        config = config_of(tmp_path, stage, args={"steps": []})
        assert two_ranks.run(ending, config)[0] == ("", 0, False)
        assert f"step-{ends_at:08d}, {manifest.note}" in log_text(config)


def test_the_first_steps_change_no_buffers(two_ranks: RankPool, tmp_path: Path) -> None:
    """When it is not known yet which ones training changes; with an evaluation before them."""
    args = {"steps": [1, 2], "factor": "gradient"}
    config = config_of(tmp_path, 1, args=args, trainer={"eval_every": 5})
    two_ranks.run(run_in_world, config)
    state = torch.load(checkpoint(config, 2) / rank_file(1), weights_only=True)
    assert state["engines"]["engines"]["net"]["buffers"]["changed"] == []
    model = torch.load(next(checkpoint(config, 2).glob("net/mp_rank_00*")), weights_only=False)
    assert not model["module"]["norm.running_mean"].any()
    assert "step 2: engine net: skipped, as its gradients are not finite (2 so far): " in (
        text := log_text(config)
    )
    assert "(2 so far): every loss is, so it began in a backward\n" in text
    assert "training changes 4 buffers" in text


def test_each_engine_skips_for_itself(two_ranks: RankPool, tmp_path: Path) -> None:
    """The other trains as if it were alone."""
    engine = config_of(tmp_path).model_dump()["engines"]["net"]
    args = {"steps": [3, 4], "engine": "b"}
    config = config_of(tmp_path / "both", args=args, engines={"a": engine, "b": engine})
    del (table := config.model_dump())["engines"]["net"]
    config = Config.model_validate(table)
    two_ranks.run(run_in_world, config)
    found = records(config)
    assert [r["b/skipped"] for r in found] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert {r["a/skipped"] for r in found} == {0}
    assert "step 4: engine b: skipped" in log_text(config)
    assert [r["b/loss"] == "nan" for r in found] == [step in (3, 4) for step in range(1, 11)]
    assert all(isinstance(r["a/loss"], float) for r in found)


def audited(config: Config) -> list[str]:
    """What the run has done by itself."""
    lines = (config.run_dir / "commands.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [record["result"] for record in found if record["front"] == "health"]


ROLLBACK: dict[str, Any] = {"nonfinite": "rollback"}
BAD = [33, 42]
"""Samples of steps 5 and 6, of rank 1 and of rank 0."""


@pytest.mark.parametrize(("stage", "dtype", "optimizer"), layouts((3, "bf16", "adamw")))
def test_a_rollback_drops_the_samples_of_the_step_alone(
    two_ranks: RankPool, tmp_path: Path, stage: int, dtype: str, optimizer: str
) -> None:
    """To the bit as if they had not been in the data."""
    layout = stage, dtype, optimizer
    config = config_of(tmp_path / "back", *layout, args={"bad": BAD}, health=ROLLBACK)
    without = {"without": list(range(32, 48))}
    reference = config_of(tmp_path / "reference", *layout, args=without)
    two_ranks.run(run_in_world, config)
    two_ranks.run(run_in_world, reference)
    assert_same_end(config, reference)
    names = ("step", "loss", "lr", "grad_norm", "skipped", "samples")
    assert [[r[n] for n in names] for r in records(config)] == [
        [r[n] for n in names] for r in records(reference)
    ]
    back = "returned to step 4 ({} of 3 rollbacks); step 5's samples are dropped: "
    assert audited(config) == [
        back.format(1) + ", ".join(map(str, range(32, 40))),
        back.format(2) + ", ".join(map(str, range(40, 48))),
    ]
    saved = torch.load(checkpoint(config, 6) / rank_file(1), weights_only=True)
    assert saved["batches"]["sampler"]["dropped"] == [(0, 32, 40), (0, 32, 40)]
    assert saved["engines"]["rollbacks"] == 2


@pytest.mark.parametrize("kind", [pytest.param("weigh", marks=SLOW), "loader"])
def test_a_resume_after_a_rollback_drops_the_same_samples(
    two_ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    """In workers, fetched ahead; or with a loader of the task."""
    args = {"bad": [21, 33], "kind": kind}
    table: dict[str, Any] = {"data": {"sampler": "random", "workers": int(kind == "weigh")}}
    health = ROLLBACK | {"max_rollbacks": 9}
    config = config_of(tmp_path, args=args, run={"steps": 15}, health=health, **table)
    two_ranks.run(run_in_world, config)
    assert len(audited(config)) >= 2
    expected = losses(config)
    assert not any(isinstance(loss, str) for loss in expected)
    first = int(re.findall(r"returned to step (\d+)", audited(config)[0])[0])
    for path in checkpoints_in(config.run_dir / "checkpoints"):
        if int(path.name[-8:]) > first + 2:
            shutil.rmtree(path)
    two_ranks.run(run_in_world, config)
    resumed = f"resumed from {checkpoint(config, first + 2)}\n"
    assert log_text(config).count(resumed) == 1
    assert losses(config) == expected


@pytest.mark.parametrize(
    ("args", "health", "error", "saved"),
    [
        (
            {"steps": [3], "rank": None},
            {"max_rollbacks": 2},
            f"step 3: {SKIPPED} (health.max_rollbacks = 2)",
            [3, 2, 0],
        ),
        ({"bad": [1]}, {}, "", [10, 8, 6, 4, 2, 0]),  # the first step of all
    ],
)
def test_rollbacks_end(
    two_ranks: RankPool, tmp_path: Path, args: Any, health: Any, error: str, saved: list[int]
) -> None:
    """A run that has no checkpoint yet saves one before its first step."""
    config = config_of(tmp_path, args=args, health=ROLLBACK | health)
    assert two_ranks.run(ending, config)[1] == (error, 2 if error else 0, bool(error))
    found = checkpoints_in(config.run_dir / "checkpoints")
    assert [int(path.name[-8:]) for path in found] == saved
    assert len(audited(config)) == (2 if error else 1)
    if not error:
        without = {"without": list(range(8))}
        reference = config_of(tmp_path / "reference", args=without)
        two_ranks.run(run_in_world, reference)
        assert_same_end(config, reference)


SPIKE: dict[str, Any] = {"steps": [75], "rank": None, "factor": "1000", "once": True}


def spiking(directory: Path, policy: str, stage: int, **overrides: Any) -> Config:
    """A run of 80 steps, saved every tenth, in which one step is 1000 times as steep."""
    table: dict[str, Any] = {"run": {"steps": 80}, "trainer": {"save_every": 10}}
    health = {"spike": policy}
    return config_of(directory, stage, args=SPIKE, health=health, **merge(table, overrides))


@pytest.mark.parametrize("policy", ["report", pytest.param("skip", marks=SLOW)])
def test_a_spike_is_reported_or_skipped(two_ranks: RankPool, tmp_path: Path, policy: str) -> None:
    """And found at the same step, whether the run was resumed or not. The log warns of one."""
    config = spiking(tmp_path, policy, 3, task={"args": {"steps": [75, 77]}})
    two_ranks.run(run_in_world, config)
    found = records(config)
    assert [r["spikes"] for r in found] == [0] * 74 + [1] * 2 + [2] * 4
    is_skip = int(policy == "skip")
    assert [r["skipped"] for r in found] == [0] * 74 + [is_skip] * 2 + [2 * is_skip] * 4
    assert found[74]["grad_norm"] > 100 * found[73]["grad_norm"]
    text = log_text(config)
    assert text.count("step 75: engine 'net': a spike: loss ") == 1
    assert text.count("a spike: ") == 1 and "2 spikes of loss or gradient norm" in text
    skipped = "step 75: engine net: skipped, as the norm of its gradients is a spike (1 so far): "
    assert text.count(skipped) == (policy == "skip")
    shutil.rmtree(checkpoint(config, 80))
    two_ranks.run(run_in_world, config)
    assert without_times(records(config)) == without_times(found)


@pytest.mark.parametrize("policy", ["report", "rollback"])
def test_a_spike_is_told_of_once_over_a_save_and_a_resume(
    pools: Pools, tmp_path: Path, policy: str
) -> None:
    """Of the step before the save. A run that is complete, and started again, tells of none; one
    that is extended returns, and says why."""
    config = spiking(tmp_path, policy, 0, run={"steps": 75})
    longer = spiking(
        tmp_path, policy, 0, task={"args": {"steps": []}}
    )  # step 75 was a bad sample's
    told = []
    for each in (config, config, longer):
        pools(1).run(run_in_world, each)
        told.append(log_text(config).count("step 75: engine 'net': a spike: loss "))
    assert records(config)[74]["spikes"] == (policy == "report")
    assert audited(config) == [] if policy == "report" else len(audited(config)) == 1
    assert told == [1, 1, 1 + (policy == "rollback")]


@SLOW
def test_a_rollback_before_a_spike(two_ranks: RankPool, tmp_path: Path) -> None:
    """It is known two steps later, when there is a checkpoint with it, which is removed."""
    config = spiking(tmp_path / "back", "rollback", 1, trainer={"save_every": 25})
    two_ranks.run(run_in_world, config)
    dropped = list(range(16, 24))  # of the seventh epoch: 8 samples a step, 12 steps an epoch
    assert audited(config) == [
        "returned to step 50 (1 of 3 rollbacks); step 75's samples are dropped: "
        + ", ".join(map(str, dropped))
    ]
    reference = spiking(
        tmp_path / "reference",
        "report",
        1,
        task={"args": {"steps": []}},
        trainer={"save_every": 25},
    )
    two_ranks.run(run_in_world, reference)
    for path in checkpoints_in(reference.run_dir / "checkpoints")[:2]:
        shutil.rmtree(path)

    def drop(rank: int, state: Any) -> None:
        state["batches"]["sampler"]["dropped"] = [(6, 16, 24)]

    edit_checkpoint(checkpoint(reference, 50), drop)
    two_ranks.run(run_in_world, reference)
    assert_same_end(config, reference)
    assert losses(config) == losses(reference)


@pytest.mark.parametrize(
    ("stage", "args", "rank", "text"),
    [
        pytest.param(
            *(3, {"bad": [33]}, 1),
            "micro-batch 0 (samples 33, 35, 37, 39): the first not to be finite is the batch",
            marks=SLOW,
        ),
        pytest.param(
            *(0, {"steps": [5], "factor": "inf"}, 1),
            "the loss, although the outputs of all modules are",
            marks=SLOW,
        ),
        pytest.param(
            *(2, {"steps": [5], "factor": "gradient", "rank": 0}, 0),
            "the gradient of the output of last",
            marks=SLOW,
        ),
        (
            *(1, {"steps": [5], "factor": "layer"}, 1),
            "the output of norm (BatchNorm1d), its inputs are finite",
        ),
    ],
)
def test_blame(
    two_ranks: RankPool, tmp_path: Path, stage: int, args: Any, rank: int, text: str
) -> None:
    """And the run is the same as without."""
    config = config_of(tmp_path / "blaming", stage, args=args, health={"blame": True})
    without = config_of(tmp_path / "not", stage, args=args)
    for run in (config, without):
        two_ranks.run(run_in_world, run)
    (found,) = audited(config)
    assert found.startswith(f"rank {rank}, micro-batch 0 (samples 3") and text in found
    assert f"step 5: blame net: done: {found}" in log_text(config)
    assert_same_end(config, without)
    assert without_times(records(config)) == without_times(records(without))
