"""A checkpoint of one number of ranks and ZeRO stage resumed on another, exactly."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import io
from harness.checkpoint import resume
from harness.checkpoint.save import collect, write_files
from harness.config import Config
from harness.config.engine_sections import OptimizerConfig
from harness.config.sections import merge
from harness.convert.convert import Options, convert
from harness.io.stored import materialize, read
from harness.optim.build import is_elementwise
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.support.helpers import OFFLOAD, ROOT, error_of, records, tiny_config
from tests.tasks.tiny_task import SAMPLES

BATCH = 8
TASK = str(ROOT / "tests/tasks/reshard_task.py")
ODD = {"path": TASK}
TWO_GROUPS = {"optimizer": {"name": "tests.tasks.reshard_task:TwoGroups", "lr": 1e-2}}
Layout = tuple[int, int]
Pools = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def pools(two_ranks: RankPool, four_ranks: RankPool) -> Iterator[Pools]:
    with RankPool(1) as one_rank:
        yield {1: one_rank, 2: two_ranks, 4: four_ranks}.__getitem__


def config_of(
    directory: Path, layout: Layout, engine: Any = None, steps: int = 8, **overrides: Any
) -> Config:
    """A run on `layout` (ranks, ZeRO stage) with a batch of 8, saved after 4 steps."""
    world, stage = layout
    table = {
        "run": {"steps": steps},
        "data": {"micro_batch_size": BATCH // world},
        "engines": {"net": {"scheduler": {"name": "cosine", "warmup": 3}} | (engine or {})},
        "trainer": {"save_every": 4, "export_on_quit": False},
    }
    return tiny_config(directory, stage, **merge(table, overrides))


def checkpoint(config: Config, step: int = 4) -> Path:
    return config.run_dir / f"checkpoints/step-{step:08d}"


def losses(config: Config) -> list[float]:
    key = "net/loss" if len(config.engines) > 1 else "loss"
    return [record[key] for record in records(config)]


def hand_over(whole: Config, parts: Config) -> None:
    """Gives the checkpoint of one run to another."""
    shutil.copytree(checkpoint(whole), checkpoint(parts))


def train_and_look(config: Config) -> None:
    """A run that writes what it has resumed into `resumed/`, before its next step."""
    done = resume.resume

    def and_look(directory: Path, engines: Any, *others: Any) -> None:
        done(directory, engines, *others)
        for engine in engines.trained:
            write_files(config.run_dir / "resumed", collect(engine))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "resume", and_look)
        (config.run_dir / "resumed").mkdir(exist_ok=True)
        run_in_world(config)


def assert_resumed(whole: Config, parts: Config, engine: str = "net") -> None:
    """Everything that `parts` resumed is equal to what `whole` saved, by name."""
    one = SavedEngine(checkpoint(whole) / engine)
    other = SavedEngine(parts.run_dir / "resumed" / engine)
    assert one.shapes == other.shapes
    for name in one.shapes:
        assert torch.equal(read(one.master(name)), read(other.master(name))), name
        assert one.state_keys(name) == other.state_keys(name) == ["exp_avg", "exp_avg_sq"]
        for key in one.state_keys(name):
            mine, its = read(one.moment(name, key)), read(other.moment(name, key))
            assert torch.equal(mine, its), (name, key)
        assert materialize(one.scalars(name)) == materialize(other.scalars(name))
        assert one.group_of(name) == other.group_of(name)
    for name in one.model["module"]:
        mine, its = read(one.weight(name)), read(other.weight(name))
        assert one.model["module"][name].dtype == other.model["module"][name].dtype
        dtype = getattr(torch, one.model["module"][name].dtype)
        assert torch.equal(mine.to(dtype), its.to(dtype)), name
    assert materialize(one.groups) == materialize(other.groups)
    for key in ("lr_scheduler", "global_steps", "global_samples", "skipped_steps"):
        assert one.model[key] == other.model[key], key


def both(pools: Pools, whole: Config, parts: Config, before: Layout, after: Layout) -> float:
    """Runs `whole`, and `parts` from its step 4 on. The largest difference of their losses."""
    pools(before[0]).run(run_in_world, whole)
    hand_over(whole, parts)
    pools(after[0]).run(train_and_look, parts)
    return max(abs(a - b) for a, b in zip(losses(parts), losses(whole)[4:], strict=True))


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


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_goes_on_in_another_layout(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    whole, parts = config_of(tmp_path / "whole", before), config_of(tmp_path / "parts", after)
    assert both(pools, whole, parts, before, after) < 1e-5
    assert_resumed(whole, parts)
    log = (parts.run_dir / "log.txt").read_text()
    was, now = (rf"{world} ranks, ZeRO {stage}, layout \w+" for world, stage in (before, after))
    assert re.search(f"re-laid step-00000004/net from {was} to {now}", log)
    assert not list(parts.run_dir.glob("checkpoints/*.tmp"))


@pytest.mark.parametrize(
    ("before", "after"), [((2, 0), (4, 1)), ((2, 2), (1, 3)), ((4, 3), (2, 0))]
)
def test_master_weights_of_bf16_move_exactly(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    engine = {"ds_overrides": {"bf16": {"enabled": True}}}
    whole = config_of(tmp_path / "whole", before, engine)
    parts = config_of(tmp_path / "parts", after, engine)
    assert both(pools, whole, parts, before, after) < 1e-2
    assert_resumed(whole, parts)


@pytest.mark.parametrize(
    ("before", "after"), [((2, 1), (1, 3)), ((2, 2), (4, 1)), ((2, 3), (2, 2)), ((2, 3), (1, 0))]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_offloaded_moves_exactly(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, dtype: str
) -> None:
    bf16 = {"bf16": {"enabled": dtype == "bf16"}}
    offloaded = {"ds_overrides": bf16 | OFFLOAD}
    whole = config_of(tmp_path / "whole", before, offloaded)
    parts = config_of(tmp_path / "parts", after, offloaded if after[1] else {"ds_overrides": bf16})
    assert both(pools, whole, parts, before, after) < (1e-2 if dtype == "bf16" else 1e-5)
    assert_resumed(whole, parts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fused_adam_moves_exactly(tmp_path: Path) -> None:
    """At stage 0 it steps one tensor a group. Its operator is compiled first, in minutes."""
    engine = {
        "optimizer": {"name": "deepspeed.ops.adam:FusedAdam"},
        "ds_overrides": {"bf16": {"enabled": True}},
    }
    with RankPool(2, timeout_s=600) as patient:
        for number, stages in enumerate([(0, 1), (3, 0)]):
            before, after = ((2, stage) for stage in stages)
            whole = config_of(tmp_path / f"{number}/whole", before, engine)
            parts = config_of(tmp_path / f"{number}/parts", after, engine)
            assert both({2: patient}.__getitem__, whole, parts, before, after) < 1e-2
            assert_resumed(whole, parts)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_is_no_other_layout(pools: Pools, tmp_path: Path, stage: int) -> None:
    whole = config_of(tmp_path / "whole", (2, stage))
    parts = config_of(tmp_path / "parts", (2, stage), {"ds_overrides": OFFLOAD})
    assert both(pools, whole, parts, (2, stage), (2, stage)) < 1e-5
    assert_resumed(whole, parts)
    assert "re-laid" not in (parts.run_dir / "log.txt").read_text()


@pytest.mark.parametrize(
    ("before", "after"), [((2, 3), (4, 1)), ((2, 2), (4, 3)), ((1, 0), (2, 2)), ((4, 1), (2, 0))]
)
def test_odd_layouts_and_a_teacher(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    """Two parameter groups, frozen parameters, many sub-groups, alignment, permuted shards."""
    whole, parts = odd_config(tmp_path / "whole", before, 1), odd_config(tmp_path, after, 2)
    assert both(pools, whole, parts, before, after) < 1e-5
    assert_resumed(whole, parts)
    resumed = SavedEngine(parts.run_dir / "resumed/net")
    assert read(resumed.weight("frozen.weight")).eq(1).all()
    assert [group["weight_decay"] for group in resumed.groups] == [0.1, 0.0]


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


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("stage", "change"),
    [(1, ROUND_ROBIN), (2, ROUND_ROBIN), (1, ALIGNED), (2, ALIGNED), (3, SMALL_GROUPS)],
)
def test_another_layout_on_the_same_ranks_is_noticed(
    pools: Pools, tmp_path: Path, stage: int, change: Any, back: bool
) -> None:
    whole, parts = (
        config_of(tmp_path / name, (2, stage), TWO_GROUPS | {"ds_overrides": keys}, task=ODD)
        for name, keys in zip(("whole", "parts"), in_turn({}, change, back), strict=True)
    )
    assert both(pools, whole, parts, (2, stage), (2, stage)) < 1e-5
    assert_resumed(whole, parts)
    assert "re-laid step-00000004/net" in (parts.run_dir / "log.txt").read_text()


@pytest.mark.parametrize("back", [False, True])
def test_another_precision_wrapper_is_noticed(pools: Pools, tmp_path: Path, back: bool) -> None:
    """bf16 at stage 1 is BF16_Optimizer's with fp32 gradients, and else ZeRO's."""
    bf16 = {"bf16": {"enabled": True}}
    fp32 = bf16 | {"data_types": {"grad_accum_dtype": "fp32"}}
    whole, parts = (
        config_of(tmp_path / name, (2, 1), {"ds_overrides": keys})
        for name, keys in zip(("whole", "parts"), in_turn(bf16, fp32, back), strict=True)
    )
    assert both(pools, whole, parts, (2, 1), (2, 1)) < 1e-2
    assert_resumed(whole, parts)
    assert "re-laid step-00000004/net" in (parts.run_dir / "log.txt").read_text()


def in_turn(first: Any, second: Any, back: bool) -> tuple[Any, Any]:
    return (second, first) if back else (first, second)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_order_of_the_parameters_is_noticed(
    pools: Pools, tmp_path: Path, stage: int
) -> None:
    whole = config_of(tmp_path / "whole", (2, stage), task=ODD)
    parts = config_of(tmp_path / "parts", (2, stage), task=ODD | {"args": {"reordered": True}})
    assert both(pools, whole, parts, (2, stage), (2, stage)) < 1e-5
    assert_resumed(whole, parts)


@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 3)), ((2, 3), (2, 0))])
def test_extra_state_moves_is_exported_and_converted(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    task = {"path": TASK, "args": {"counts": True}}
    settings: Any = {"steps": 4, "task": task, "trainer": {"export_on_quit": True, "eval_every": 0}}
    pools(before[0]).run(run_in_world, config_of(tmp_path, before, **settings))
    config = config_of(tmp_path, after, **settings | {"steps": 8})
    pools(after[0]).run(run_in_world, config)
    told: list[str] = []
    convert(config.run_dir, tmp_path / "weights.sft", Options(dtype="bf16"), told.append)
    exported = io.load(config.run_dir / "exports/step-00000008/net.sft")
    for found in (exported, io.load(tmp_path / "weights.sft")):
        assert found["dropout.0._extra_state"] == torch.tensor(8.0)
        assert "dropout.1._extra_state" not in found
    assert told[0] == "note: 'dropout.1._extra_state' is no tensor, and is left out: a dict"
    log = (config.run_dir / "log.txt").read_text()
    assert "engine net: no tensor, and left out: dropout.1._extra_state" in log
    convert(checkpoint(config, 8), tmp_path / "native", Options(to_zero=1, ranks=2), told.append)
    native = materialize(SavedEngine(tmp_path / "native/global_step8").extra)
    assert native["dropout.1._extra_state"] == {"calls": 8}
    init = {"init_from": tmp_path / "weights.sft"}
    started = config_of(tmp_path / "new", after, init, **settings | {"steps": 1})
    pools(after[0]).run(run_in_world, started)
    log = (started.run_dir / "log.txt").read_text()
    assert "engine net: extra state is not taken: dropout.0._extra_state" in log


def test_no_sample_is_lost_or_repeated(pools: Pools, tmp_path: Path) -> None:
    task = {"path": TASK, "args": {"notes": str(tmp_path)}}
    pools(2).run(run_in_world, config_of(tmp_path, (2, 1), steps=4, task=task))
    pools(4).run(run_in_world, config_of(tmp_path, (4, 2), steps=SAMPLES // BATCH, task=task))
    seen = [int(line) for path in tmp_path.glob("rank-*.txt") for line in path.open()]
    assert sorted(seen) == list(range(SAMPLES))


ADAFACTOR = {"optimizer": {"name": "torch.optim:Adafactor", "lr": 1e-2}}


@pytest.mark.parametrize(
    ("before", "after"), [((2, 0), (4, 1)), ((2, 1), (2, 0)), ((2, 3), (4, 3)), ((2, 2), (2, 3))]
)
def test_state_that_depends_on_shapes_is_refused(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout
) -> None:
    pools(before[0]).run(run_in_world, config_of(tmp_path, before, ADAFACTOR, steps=4))
    config = config_of(tmp_path, after, ADAFACTOR)
    told = pools(after[0]).run(error_of, config)
    assert all("depends on the parameters' shapes" in text for text in told), told
    assert all(f"resume on {before[0]} ranks, ZeRO {before[1]}" in text for text in told), told
    assert len(losses(config)) == 4


APOLLO = {"rank": 2, "low_rank": "weight", "update_proj_gap": 3, "lr": 3e-2}


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ((2, 1), (1, 0), "apollo"),
        ((2, 2), (4, 2), "apollo"),
        ((2, 1), (2, 3), "apollo-mini"),
        ((4, 3), (2, 1), "apollo"),
    ],
)
def test_apollo_goes_on_in_another_layout(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, name: str
) -> None:
    zero = {"sub_group_size": 50, "round_robin_gradients": True, "parameter_alignment": True}
    engine = {
        "optimizer": {"name": name} | APOLLO,
        "ds_overrides": {"zero_optimization": zero},
    }
    whole, parts = (
        config_of(tmp_path / directory, layout, engine, steps=28, task=ODD)
        for directory, layout in (("whole", before), ("parts", after))
    )
    assert both(pools, whole, parts, before, after) < 2e-5
    assert_low_rank_resumed(whole, parts)


def assert_low_rank_resumed(whole: Config, parts: Config) -> None:
    """All that APOLLO keeps of V is there, whoever has it."""
    sums = []
    for directory in (checkpoint(whole) / "net", parts.run_dir / "resumed/net"):
        saved = SavedEngine(directory)
        kept = [flat for flats in saved.flats for flat in flats if saved.groups[flat.group]["rank"]]
        sums.append(
            sum(float(materialize(flat.state["exp_avg_sq"]).double().sum()) for flat in kept)
        )
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)
    assert sums[0] > 0


def test_nothing_is_written_beside_the_checkpoint(pools: Pools, tmp_path: Path) -> None:
    """Another run may be re-laying it as well."""
    whole = config_of(tmp_path / "whole", (2, 1), steps=4)
    pools(2).run(run_in_world, whole)
    its = checkpoint(whole).with_name("step-00000004.relayout.tmp")
    its.mkdir()
    looks = [path.stat().st_mtime_ns for path in (its, its.parent)]
    parts = config_of(tmp_path / "parts", (2, 2), run={"resume": str(checkpoint(whole))})
    pools(2).run(run_in_world, parts)
    assert "re-laid step-00000004/net" in (parts.run_dir / "log.txt").read_text()
    assert [path.stat().st_mtime_ns for path in (its, its.parent)] == looks
    assert not list(parts.run_dir.glob("checkpoints/*.tmp"))


@pytest.mark.parametrize("engine", [ADAFACTOR, {}])
def test_nothing_is_cut_at_stage_0(pools: Pools, tmp_path: Path, engine: Any) -> None:
    """Every rank has it all: the checkpoint is loaded as it is, whatever the optimizer's state."""
    whole, parts = (config_of(tmp_path / name, (2, 0), engine) for name in ("whole", "parts"))
    other = config_of(tmp_path / "parts", (4, 0), engine)
    pools(2).run(run_in_world, whole)
    hand_over(whole, parts)
    (checkpoint(parts) / "rank-00001.pt").unlink()  # random generators that nobody can go on with
    pools(4).run(train_and_look, other)
    assert losses(other) == pytest.approx(losses(whole)[4:], abs=1e-5)
    assert "re-laid" not in (parts.run_dir / "log.txt").read_text()


@pytest.mark.parametrize(
    ("name", "elementwise"),
    [
        ("adamw", True),
        ("torch.optim:SGD", True),
        ("torch.optim:Adafactor", False),
        ("apollo", False),
        ("torch.optim:Muon", False),
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
    assert "re-laid" not in (config.run_dir / "log.txt").read_text()
