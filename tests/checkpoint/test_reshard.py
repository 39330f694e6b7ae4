"""A checkpoint of one number of ranks and ZeRO stage resumed on another, exactly."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import io
from harness.checkpoint import resume
from harness.checkpoint.commit import write_files
from harness.config import Config
from harness.config.engine_sections import OptimizerConfig
from harness.config.sections import merge
from harness.convert.convert import Options, convert
from harness.io.stored import materialize, read_tensor
from harness.optim.zero_compatibility import is_elementwise
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.support.helpers import (
    OFFLOAD,
    ROOT,
    Pools,
    assert_same_optimizer,
    checkpoint,
    error_of,
    exported,
    log_text,
    records,
    tiny_config,
)
from tests.support.quick import quick
from tests.tasks.tiny_task import SAMPLES

BATCH = 8
TASK = str(ROOT / "tests/tasks/reshard_task.py")
ODD = {"path": TASK}
TWO_GROUPS = {"optimizer": {"name": "tests.tasks.reshard_task:TwoGroups", "lr": 1e-2}}
Layout = tuple[int, int]
"""`(ranks, ZeRO stage)`."""


def config_of(
    directory: Path, layout: Layout, engine: Any = None, steps: int = 8, **overrides: Any
) -> Config:
    """A run on `layout` with a batch of 8, saved after 4 steps."""
    world, stage = layout
    table = {
        "run": {"steps": steps},
        "data": {"micro_batch_size": BATCH // world},
        "engines": {"net": {"scheduler": {"name": "cosine", "warmup": 3}} | (engine or {})},
        "trainer": {"save_every": 4, "export_at_end": False},
    }
    return tiny_config(directory, stage, **merge(table, overrides))


def losses(config: Config) -> list[float]:
    key = "net/loss" if len(config.engines) > 1 else "loss"
    return [record[key] for record in records(config)]


def copy_checkpoint(full: Config, resumed: Config) -> None:
    """Copies the checkpoint of one run to another."""
    shutil.copytree(checkpoint(full, 4), checkpoint(resumed, 4))


def train_and_dump(config: Config) -> None:
    """A run that writes what it has resumed into `resumed/`, before its next step."""
    original = resume.restore

    def and_dump(directory: Path, engines: Any, *others: Any) -> None:
        parent = config.run_dir / "checkpoints"
        changed_at = parent.stat().st_mtime_ns
        original(directory, engines, *others)
        assert parent.stat().st_mtime_ns == changed_at  # nothing was written there
        for engine in engines.trained:
            write_files(config.run_dir / "resumed", engine.collect())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "restore", and_dump)
        (config.run_dir / "resumed").mkdir(exist_ok=True)
        run_in_world(config)


def assert_resumed(full: Config, resumed: Config, engine: str = "net") -> None:
    """Everything that `resumed` started from is equal to what `full` saved, by name."""
    saved = SavedEngine(checkpoint(full, 4) / engine)
    found = SavedEngine(resumed.run_dir / "resumed" / engine)
    assert_same_optimizer(found, saved)
    assert all(saved.state_keys(name) == ["exp_avg", "exp_avg_sq"] for name in saved.shapes)
    for name, weight in saved.model["module"].items():
        assert found.model["module"][name].dtype == weight.dtype
        dtype = getattr(torch, weight.dtype)
        before, after = (read_tensor(engine.weight(name)).to(dtype) for engine in (saved, found))
        assert torch.equal(before, after), name
    for key in ("lr_scheduler", "global_steps", "global_samples", "skipped_steps"):
        assert found.model[key] == saved.model[key], key


def both(pools: Pools, full: Config, resumed: Config, before: Layout, after: Layout) -> float:
    """Runs `full`, and `resumed` from its step 4 on. The largest difference of their losses."""
    pools(before[0]).run(run_in_world, full)
    copy_checkpoint(full, resumed)
    pools(after[0]).run(train_and_dump, resumed)
    return max(abs(a - b) for a, b in zip(losses(resumed), losses(full)[4:], strict=True))


CHANGES = [
    ((1, 0), (2, 1)),
    ((2, 0), (1, 3)),
    ((2, 0), (4, 2)),
    ((1, 1), (4, 0)),
    ((4, 1), (2, 1)),
    ((2, 1), (2, 3)),
    ((2, 2), (2, 0)),
    ((4, 2), (1, 1)),
    ((2, 2), (4, 2)),
    ((2, 3), (4, 3)),
    ((4, 3), (1, 0)),
    ((1, 3), (2, 2)),
]


@pytest.mark.parametrize(
    ("before", "after"),
    quick(
        CHANGES,
        ((2, 0), (1, 3)),
        ((1, 1), (4, 0)),
        ((2, 1), (2, 3)),
        ((4, 2), (1, 1)),
        ((2, 3), (4, 3)),
        ((1, 3), (2, 2)),
    ),
)
def test_a_run_resumes_in_another_layout(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    full, resumed = config_of(tmp_path / "full", before), config_of(tmp_path / "resumed", after)
    assert both(pools, full, resumed, before, after) < 1e-5
    assert_resumed(full, resumed)
    log = log_text(resumed)
    was, now = (rf"{world} ranks?, ZeRO {stage}, layout \w+" for world, stage in (before, after))
    assert re.search(f"resharded step-00000004/net from {was} to {now}", log)
    assert not list(resumed.run_dir.glob("checkpoints/*.tmp"))


@pytest.mark.parametrize(
    ("before", "after"),
    quick(
        [((2, 0), (4, 1)), ((2, 2), (1, 3)), ((4, 3), (2, 0))], ((2, 2), (1, 3)), ((4, 3), (2, 0))
    ),
)
def test_master_weights_of_bf16_move_exactly(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    engine = {"ds_overrides": {"bf16": {"enabled": True}}}
    full = config_of(tmp_path / "full", before, engine)
    resumed = config_of(tmp_path / "resumed", after, engine)
    assert both(pools, full, resumed, before, after) < 1e-2
    assert_resumed(full, resumed)


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    quick(
        [
            (*change, dtype)
            for change in (
                ((2, 1), (1, 3)),
                ((2, 2), (4, 1)),
                ((2, 3), (2, 2)),
                ((2, 3), (1, 0)),
            )
            for dtype in ("fp32", "bf16")
        ],
        ((2, 1), (1, 3), "bf16"),
        ((2, 3), (2, 2), "fp32"),
        ((2, 3), (1, 0), "bf16"),
    ),
)
def test_what_is_offloaded_moves_exactly(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, dtype: str
) -> None:
    bf16 = {"bf16": {"enabled": dtype == "bf16"}}
    offloaded = {"ds_overrides": bf16 | OFFLOAD}
    full = config_of(tmp_path / "full", before, offloaded)
    resumed = config_of(
        tmp_path / "resumed", after, offloaded if after[1] else {"ds_overrides": bf16}
    )
    assert both(pools, full, resumed, before, after) < (1e-2 if dtype == "bf16" else 1e-5)
    assert_resumed(full, resumed)


NOT_FUSED = {"optimizer": {"name": "adamw", "lr": 1e-2, "fused": False}}


@pytest.mark.parametrize(
    ("before", "engine", "after", "expected"),
    [
        ((1, 2), NOT_FUSED, (1, 2), False),  # as by versions without this default
        ((1, 2), {}, (1, 0), None),  # where torch's kernel does not take every gradient
        pytest.param((1, 2), {}, (1, 2), True, marks=pytest.mark.slow),
        pytest.param((1, 2), NOT_FUSED, (1, 1), False, marks=pytest.mark.slow),
        pytest.param((1, 0), {}, (1, 2), None, marks=pytest.mark.slow),
    ],
)
def test_a_resume_keeps_its_choice_of_fused_adamw(
    pools: Pools, tmp_path: Path, before: Layout, engine: Any, after: Layout, expected: bool | None
) -> None:
    full = config_of(tmp_path / "full", before, engine, steps=4)
    resumed = config_of(tmp_path / "resumed", after, steps=5)
    pools(1).run(run_in_world, full)
    copy_checkpoint(full, resumed)
    pools(1).run(train_and_dump, resumed)
    groups = SavedEngine(resumed.run_dir / "resumed/net").groups
    assert [group["fused"] for group in groups] == [expected]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fused_adam_moves_exactly(tmp_path: Path) -> None:
    """At stage 0 it steps one tensor a group. Its operator is compiled first, in minutes."""
    engine = {
        "optimizer": {"name": "deepspeed.ops.adam:FusedAdam"},
        "ds_overrides": {"bf16": {"enabled": True}},
    }
    with RankPool(2, timeout_s=600) as pool:
        for number, stages in enumerate([(0, 1), (3, 0)]):
            before, after = ((2, stage) for stage in stages)
            full = config_of(tmp_path / f"{number}/full", before, engine)
            resumed = config_of(tmp_path / f"{number}/resumed", after, engine)
            assert both({2: pool}.__getitem__, full, resumed, before, after) < 1e-2
            assert_resumed(full, resumed)


@pytest.mark.parametrize("stage", quick([1, 2, 3], 2, 3))
def test_offloading_changes_no_layout(pools: Pools, tmp_path: Path, stage: int) -> None:
    full = config_of(tmp_path / "full", (2, stage))
    resumed = config_of(tmp_path / "resumed", (2, stage), {"ds_overrides": OFFLOAD})
    assert both(pools, full, resumed, (2, stage), (2, stage)) < 1e-5
    assert_resumed(full, resumed)
    assert "resharded step" not in log_text(resumed)


@pytest.mark.parametrize(
    ("before", "after"),
    quick(
        [((2, 3), (4, 1)), ((2, 2), (4, 3)), ((1, 0), (2, 2)), ((4, 1), (2, 0))],
        ((2, 3), (4, 1)),
        ((1, 0), (2, 2)),
    ),
)
def test_odd_layouts_and_a_teacher(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    """Two parameter groups, frozen parameters, many sub-groups, alignment, permuted shards."""
    full, resumed = odd_config(tmp_path / "full", before, 1), odd_config(tmp_path, after, 2)
    assert both(pools, full, resumed, before, after) < 1e-5
    assert_resumed(full, resumed)
    engine = SavedEngine(resumed.run_dir / "resumed/net")
    assert read_tensor(engine.weight("frozen.weight")).eq(1).all()
    assert [group["weight_decay"] for group in engine.groups] == [0.1, 0.0]


def odd_config(directory: Path, layout: Layout, fill: float) -> Config:
    zero = {"sub_group_size": 50, "round_robin_gradients": True, "parameter_alignment": True}
    net = TWO_GROUPS | {"ds_overrides": {"zero_optimization": zero}}
    stage = 3 if layout[1] == 3 else 0
    wise = {"ds_config": ROOT / f"ds_configs/zero{stage}.json", "role": "teacher"}
    task = {"path": TASK, "args": {"fill": fill}}
    return config_of(directory, layout, net, task=task, engines={"wise": wise})


ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
ALIGNED = {"zero_optimization": {"parameter_alignment": True}}
SMALL_GROUPS = {"zero_optimization": {"sub_group_size": 50}}


@pytest.mark.parametrize(
    ("stage", "change", "back"),
    quick(
        [
            (stage, change, back)
            for stage, change in (
                (1, ROUND_ROBIN),
                (2, ROUND_ROBIN),
                (1, ALIGNED),
                (2, ALIGNED),
                (3, SMALL_GROUPS),
            )
            for back in (False, True)
        ],
        (1, ROUND_ROBIN, False),
        (2, ROUND_ROBIN, True),
        (1, ALIGNED, True),
        (2, ALIGNED, False),
        (3, SMALL_GROUPS, False),
    ),
)
def test_another_layout_on_the_same_ranks_is_noticed(
    pools: Pools, tmp_path: Path, stage: int, change: Any, back: bool
) -> None:
    full, resumed = (
        config_of(tmp_path / name, (2, stage), TWO_GROUPS | {"ds_overrides": keys}, task=ODD)
        for name, keys in zip(("full", "resumed"), in_turn({}, change, back), strict=True)
    )
    assert both(pools, full, resumed, (2, stage), (2, stage)) < 1e-5
    assert_resumed(full, resumed)
    assert "resharded step-00000004/net" in log_text(resumed)


@pytest.mark.parametrize("back", [False, True])
def test_another_precision_wrapper_is_noticed(pools: Pools, tmp_path: Path, back: bool) -> None:
    """bf16 at stage 1 is BF16_Optimizer's with fp32 gradients, and else ZeRO's."""
    bf16 = {"bf16": {"enabled": True}}
    fp32 = bf16 | {"data_types": {"grad_accum_dtype": "fp32"}}
    full, resumed = (
        config_of(tmp_path / name, (2, 1), {"ds_overrides": keys})
        for name, keys in zip(("full", "resumed"), in_turn(bf16, fp32, back), strict=True)
    )
    assert both(pools, full, resumed, (2, 1), (2, 1)) < 1e-2
    assert_resumed(full, resumed)
    assert "resharded step-00000004/net" in log_text(resumed)


def in_turn(first: Any, second: Any, back: bool) -> tuple[Any, Any]:
    return (second, first) if back else (first, second)


@pytest.mark.parametrize("stage", quick([0, 1, 2, 3], 0, 2, 3))
def test_another_order_of_the_parameters_is_noticed(
    pools: Pools, tmp_path: Path, stage: int
) -> None:
    full = config_of(tmp_path / "full", (2, stage), task=ODD)
    resumed = config_of(tmp_path / "resumed", (2, stage), task=ODD | {"args": {"reordered": True}})
    assert both(pools, full, resumed, (2, stage), (2, stage)) < 1e-5
    assert_resumed(full, resumed)


@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 3)), ((2, 3), (2, 0))])
def test_extra_state_moves_is_exported_and_converted(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    task = {"path": TASK, "args": {"counts": True}}
    settings: Any = {"steps": 4, "task": task, "trainer": {"export_at_end": True, "eval_every": 0}}
    pools(before[0]).run(run_in_world, config_of(tmp_path, before, **settings))
    config = config_of(tmp_path, after, **settings | {"steps": 8})
    pools(after[0]).run(run_in_world, config)
    lines: list[str] = []
    convert(config.run_dir, tmp_path / "weights.sft", Options(dtype="bf16"), lines.append)
    for found in (exported(config), io.load(tmp_path / "weights.sft")):
        assert found["dropout.0._extra_state"] == torch.tensor(8.0)
        assert "dropout.1._extra_state" not in found
    assert lines[1] == "note: skipped 'dropout.1._extra_state': not a tensor, but a dict"
    log = log_text(config)
    assert "engine net: skipped, not a tensor: dropout.1._extra_state" in log
    convert(checkpoint(config, 8), tmp_path / "native", Options(to_zero=1, ranks=2), lines.append)
    native = materialize(SavedEngine(tmp_path / "native/global_step8").extra)
    assert native["dropout.1._extra_state"] == {"calls": 8}
    init = {"init_from": tmp_path / "weights.sft"}
    started = config_of(tmp_path / "new", after, init, **settings | {"steps": 1})
    pools(after[0]).run(run_in_world, started)
    log = log_text(started)
    assert "engine net: extra state is ignored: 'dropout.0._extra_state'" in log


def test_no_sample_is_lost_or_repeated(pools: Pools, tmp_path: Path) -> None:
    task = {"path": TASK, "args": {"notes": str(tmp_path)}}
    pools(2).run(run_in_world, config_of(tmp_path, (2, 1), steps=4, task=task))
    pools(4).run(run_in_world, config_of(tmp_path, (4, 2), steps=SAMPLES // BATCH, task=task))
    seen = [int(line) for path in tmp_path.glob("rank-*.txt") for line in path.open()]
    assert sorted(seen) == list(range(SAMPLES))


ADAFACTOR = {"optimizer": {"name": "torch.optim:Adafactor", "lr": 1e-2}}


@pytest.mark.parametrize(
    ("before", "after"),
    quick(
        [((2, 0), (4, 1)), ((2, 1), (2, 0)), ((2, 3), (4, 3)), ((2, 2), (2, 3))],
        ((2, 1), (2, 0)),
        ((2, 3), (4, 3)),
    ),
)
def test_state_that_depends_on_shapes_is_refused(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    pools(before[0]).run(run_in_world, config_of(tmp_path, before, ADAFACTOR, steps=4))
    config = config_of(tmp_path, after, ADAFACTOR)
    errors = pools(after[0]).run(error_of, config)
    assert all("depends on the parameters' shapes" in text for text in errors), errors
    assert all(f"resume with {before[0]} ranks, ZeRO {before[1]}" in text for text in errors), (
        errors
    )
    assert len(losses(config)) == 4


APOLLO = {"rank": 2, "low_rank": "weight", "update_proj_gap": 3, "lr": 3e-2}


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ((2, 1), (1, 0), "apollo"),
        ((2, 1), (2, 3), "apollo-mini"),
        pytest.param((2, 2), (4, 2), "apollo", marks=pytest.mark.slow),
        pytest.param((4, 3), (2, 1), "apollo", marks=pytest.mark.slow),
    ],
)
def test_apollo_resumes_in_another_layout(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, name: str
) -> None:
    zero = {"sub_group_size": 50, "round_robin_gradients": True, "parameter_alignment": True}
    engine = {
        "optimizer": {"name": name} | APOLLO,
        "ds_overrides": {"zero_optimization": zero},
    }
    full, resumed = (
        config_of(tmp_path / directory, layout, engine, steps=28, task=ODD)
        for directory, layout in (("full", before), ("resumed", after))
    )
    assert both(pools, full, resumed, before, after) < 2e-5
    assert_low_rank_resumed(full, resumed)


def assert_low_rank_resumed(full: Config, resumed: Config) -> None:
    """All of APOLLO's state V is there, whichever rank has it."""
    sums = []
    for directory in (checkpoint(full, 4) / "net", resumed.run_dir / "resumed/net"):
        saved = SavedEngine(directory)
        flats = [flat for rank in saved.flats for flat in rank if saved.groups[flat.group]["rank"]]
        sums.append(
            sum(float(materialize(flat.state["exp_avg_sq"]).double().sum()) for flat in flats)
        )
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)
    assert sums[0] > 0


def test_nothing_is_written_beside_the_checkpoint(pools: Pools, tmp_path: Path) -> None:
    """Another run may be resharding it as well."""
    full = config_of(tmp_path / "full", (2, 1), steps=4)
    pools(2).run(run_in_world, full)
    its = checkpoint(full, 4).with_name("step-00000004.reshard.tmp")
    its.mkdir()
    changed_at = [path.stat().st_mtime_ns for path in (its, its.parent)]
    resumed = config_of(tmp_path / "resumed", (2, 2), run={"resume": str(checkpoint(full, 4))})
    pools(2).run(run_in_world, resumed)
    assert "resharded step-00000004/net" in log_text(resumed)
    assert [path.stat().st_mtime_ns for path in (its, its.parent)] == changed_at
    assert not list(resumed.run_dir.glob("checkpoints/*.tmp"))


@pytest.mark.parametrize("engine", [ADAFACTOR, {}])
def test_at_stage_0_it_is_loaded_as_it_is(pools: Pools, tmp_path: Path, engine: Any) -> None:
    """Every rank has everything, whatever the optimizer's state."""
    full, resumed = (config_of(tmp_path / name, (2, 0), engine) for name in ("full", "resumed"))
    other = config_of(tmp_path / "resumed", (4, 0), engine)
    pools(2).run(run_in_world, full)
    copy_checkpoint(full, resumed)
    (checkpoint(resumed, 4) / "rank-00001.pt").unlink()  # random generators that no rank restores
    pools(4).run(train_and_dump, other)
    assert losses(other) == pytest.approx(losses(full)[4:], abs=1e-5)
    assert "resharded step" not in log_text(resumed)


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")


@pytest.mark.parametrize(
    ("name", "elementwise"),
    [
        ("adamw", True),
        ("torch.optim:SGD", True),
        ("torch.optim:Adafactor", False),
        ("apollo", False),
        pytest.param("torch.optim:Muon", False, marks=needs_muon),
    ],
)
def test_is_elementwise(name: str, elementwise: bool) -> None:
    args = {"momentum": 0.9} if name.endswith("SGD") else {}
    config = OptimizerConfig.model_validate({"name": name, "lr": 0.1, **args})
    assert is_elementwise(config, torch.device("cpu")) == elementwise


def test_the_same_layout_is_loaded_as_it_is(pools: Pools, tmp_path: Path) -> None:
    pools(2).run(run_in_world, config_of(tmp_path, (2, 2), steps=4))
    config = config_of(tmp_path, (2, 2))
    pools(2).run(run_in_world, config)
    assert len(losses(config)) == 8
    assert "resharded step" not in log_text(config)
