"""`init_from`: a run that starts from given weights, at every ZeRO stage."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from harness import distributed, io
from harness.checkpoint import init_weights
from harness.config import Config
from harness.config.sections import merge
from harness.convert import open_checkpoint
from harness.convert.run_checkpoints import steps_in
from harness.engine.engine import Engine
from harness.engine.full_tensors import full_tensors
from harness.errors import CheckpointError, ConfigError
from harness.formats.stored_tensor import StoredTensor
from harness.io.stored import read_tensor
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.support.helpers import (
    OFFLOAD,
    ROOT,
    assert_equal,
    checkpoint,
    error_of,
    exported,
    log_text,
    tiny_config,
)
from tests.tasks.reshard_task import Odd

BF16 = {"bf16": {"enabled": True}}
ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
STILL = {"name": "adamw", "lr": 0.0, "weight_decay": 0.0}
TWO_GROUPS = {"name": "tests.tasks.reshard_task:TwoGroups", "lr": 0.0, "weight_decay": 0.0}


def config_of(
    directory: Path,
    stage: int,
    given: Path | str,
    engine: dict[str, Any] | None = None,
    **overrides: Any,
) -> Config:
    """A run of one step that changes no weight, and exports what it started from."""
    table = {
        "run": {"steps": 1},
        "task": {"path": str(ROOT / "tests/tasks/reshard_task.py")},
        "engines": {"net": merge({"init_from": given, "optimizer": STILL}, engine or {})},
    }
    return tiny_config(directory, stage, **merge(table, overrides))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    model = Odd(0.0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.state_dict()


@pytest.fixture
def given(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    io.save(weights, tmp_path / "given.sft")
    return tmp_path / "given.sft"


def assert_starts_from(config: Config, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The model's weights are those, rounded; the fp32 masters are those themselves."""
    found = exported(config, 1)
    kept = {"scale": weights["scale"].to(found["scale"].dtype)}  # buffers may keep their dtype
    assert_equal(found, {name: tensor.to(dtype) for name, tensor in weights.items()} | kept)
    saved = SavedEngine(checkpoint(config, 1) / "net")
    assert len(saved.shapes) == 6
    for name in saved.shapes:
        assert torch.equal(read_tensor(saved.master(name)), weights[name]), name


@pytest.mark.parametrize(
    ("stage", "ds", "optimizer", "args"),
    [
        (0, {}, STILL, {}),
        (0, BF16, TWO_GROUPS, {}),
        (1, BF16 | ROUND_ROBIN, TWO_GROUPS, {}),
        (1, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, STILL, {}),
        (2, merge(BF16 | OFFLOAD, ROUND_ROBIN), STILL, {}),
        (3, BF16, TWO_GROUPS, {}),
        (3, merge(BF16 | OFFLOAD, SHARDED), STILL, {}),
        (3, BF16 | SHARDED, STILL, {"born_sharded": True}),
    ],
)
def test_a_run_starts_from_the_weights_and_their_masters(
    two_ranks: RankPool,
    tmp_path: Path,
    weights: dict[str, Tensor],
    given: Path,
    stage: int,
    ds: Any,
    optimizer: Any,
    args: Any,
) -> None:
    engine = {"ds_overrides": ds, "optimizer": optimizer}
    config = config_of(tmp_path, stage, given, engine, task={"args": args})
    two_ranks.run(run_in_world, config)
    assert_starts_from(config, weights, torch.bfloat16 if "bf16" in ds else torch.float32)


def train_and_count(config: Config) -> int:
    """Trains. Returns the bytes that this rank read of the given weights."""
    counts = []

    def counted(weight: StoredTensor, *place: Any) -> Tensor:
        part = read_tensor(weight, *place)
        counts.append(part.nbytes)
        return part

    with patch.object(init_weights, "read_tensor", counted):
        run_in_world(config)
    return sum(counts)


def sources(config: Config) -> set[str]:
    """Trains. Returns the checkpoints that this rank reads; the newest one was saved after rank 0
    has looked for it."""
    found: set[str] = set()

    def read(weight: StoredTensor, *place: Any) -> Tensor:
        found.add(weight.ranges[0].path.parent.parent.name)
        return read_tensor(weight, *place)

    def listed(parent: Path) -> list[Path]:
        return steps_in(parent)[distributed.global_rank() == 0 :]

    with (
        patch.object(init_weights, "read_tensor", read),
        patch.object(open_checkpoint, "steps_in", listed),
    ):
        run_in_world(config)
    return found


def test_all_ranks_start_from_the_same_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    """Of a run that goes on meanwhile."""
    every = {"run": {"steps": 4}, "trainer": {"save_every": 2}}
    base = tiny_config(tmp_path / "base", 1, **every)
    two_ranks.run(run_in_world, base)
    config = tiny_config(tmp_path, 1, engines={"net": {"init_from": base.run_dir}})
    assert two_ranks.run(sources, config) == [{"step-00000002"}] * 2
    assert log_text(config).count("init_from: from checkpoints/step-00000002/net") == 1


def test_a_rank_reads_only_what_it_keeps(
    two_ranks: RankPool, tmp_path: Path, weights: dict[str, Tensor], given: Path
) -> None:
    del weights["again.weight"]
    engine = {"ds_overrides": BF16 | SHARDED}
    config = config_of(tmp_path, 3, given, engine, task={"args": {"born_sharded": True}})
    size = sum(tensor.nbytes for tensor in weights.values())
    frozen = weights["frozen.weight"].nbytes + weights["frozen.bias"].nbytes
    buffers = weights["scale"].nbytes
    once, twice = frozen, size - frozen - buffers  # trained weights have masters beside them
    counts = two_ranks.run(train_and_count, config)
    assert sum(counts) == once + 2 * twice + 2 * buffers
    assert max(counts) < 1.1 * sum(counts) / 2


@pytest.mark.parametrize("kind", ["pt", "shards", "single", "export", "run", "store", "bf16"])
def test_weights_may_be_in_any_kind_of_file(
    two_ranks: RankPool, tmp_path: Path, weights: dict[str, Tensor], given: Path, kind: str
) -> None:
    source: Path | str = tmp_path / kind
    match kind:
        case "pt":
            source = tmp_path / "given.pt"
            torch.save(weights, source)
        case "shards":
            io.save(weights, source, shard_size=300)
            assert len(list(source.glob("*.safetensors"))) > 2
        case "single":
            source.mkdir()
            shutil.copy(given, source / "model.safetensors")
        case "export":
            source = tmp_path / "exports/step-00000001"  # as of a run, and of a checkpoint
            source.mkdir(parents=True)
            shutil.copy(given, source / "net.sft")
        case "run" | "store":
            remote = {"remote": f"file://{tmp_path}/store" if kind == "store" else ""}
            first = config_of(
                *(tmp_path, 2, given, {"ds_overrides": BF16}),
                run={"name": "first"},
                checkpoint=remote,
            )
            two_ranks.run(run_in_world, first)
            source = f"{remote['remote']}/first" if kind == "store" else first.run_dir
            for name in ("frozen.weight", "frozen.bias"):  # which have no masters
                weights[name] = weights[name].bfloat16().float()
        case "bf16":
            source = tmp_path / "bf16.sft"
            io.save({name: tensor.bfloat16() for name, tensor in weights.items()}, source)
            weights = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    config = config_of(tmp_path, 1, source)
    two_ranks.run(run_in_world, config)
    assert_starts_from(config, weights, torch.float32)
    loaded = "loaded 9 weights (and 1 tied name) from init_from"
    assert loaded in log_text(config)
    is_cast = f"{loaded}; 9 cast from bfloat16 to float32" in log_text(config)
    assert is_cast == (kind == "bf16")


def test_of_several_engines_it_is_the_one_of_the_same_name(
    two_ranks: RankPool, tmp_path: Path, weights: dict[str, Tensor], given: Path
) -> None:
    other = {"ds_config": ROOT / "ds_configs/zero1.json", "optimizer": STILL}
    first = config_of(tmp_path / "first", 1, given, engines={"other": other})
    two_ranks.run(run_in_world, first)
    config = config_of(tmp_path, 1, first.run_dir)
    two_ranks.run(run_in_world, config)
    assert_starts_from(config, weights, torch.float32)
    elsewhere = {"ds_config": other["ds_config"], "optimizer": STILL, "init_from": first.run_dir}
    config = config_of(tmp_path / "third", 1, given, engines={"third": elsewhere})
    for error in two_ranks.run(error_of, config):
        assert "step-00000001: expected one engine, found net, other: use " in error
        assert "step-00000001/NAME" in error


def test_weights_that_do_not_fit_are_listed_and_nothing_is_written(
    two_ranks: RankPool, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    wrong = {name: tensor.clone() for name, tensor in weights.items()}
    wrong["last.wieght"] = wrong.pop("last.weight")
    wrong["first.weight"] = wrong["first.weight"].t().contiguous()
    wrong["tilt"] = torch.ones(7, dtype=torch.int64)
    wrong["again.weight"] = wrong["again.weight"] + 1
    torch.save(wrong, tmp_path / "wrong.pt")
    config = config_of(tmp_path, 3, tmp_path / "wrong.pt")
    for error in two_ranks.run(error_of, config):
        for text in (
            "engines.net.init_from",
            "missing: 'last.weight' (did you mean 'last.wieght'?)",
            "unexpected: 'last.wieght' (did you mean 'last.weight'?)",
            "wrong: 'first.weight' has the shape [6, 16] in the file, and [16, 6] in the model",
            "wrong: 'tilt' is int64 in the file, and float32 in the model",
            "wrong: 'again.weight' differs from 'middle.weight': tied in the model, but not in the",
            "harness convert",
        ):
            assert text in error, error
        assert "rank" not in error  # it is the same on all
    assert not config.run_dir.exists()
    config = config_of(tmp_path, 3, tmp_path / "nothing.sft")
    for error in two_ranks.run(error_of, config):
        assert "nothing.sft: no such file" in error


@pytest.mark.parametrize("kind", ["net.sft", "net/model.safetensors"])
def test_exports_are_no_unfinished_checkpoint(given: Path, kind: str) -> None:
    """Although their directories have the names of checkpoints."""
    step = given.parent / "exports/step-00001000"
    (step / kind).parent.mkdir(parents=True)
    shutil.copy(given, step / kind)
    assert "first.weight" in init_weights.read_weights(step, "net")
    for path, engine in ((step, "other"), (step.parent, "net")):
        with pytest.raises(CheckpointError) as caught:
            init_weights.read_weights(path, engine)
        assert "manifest.json, which is written last" not in str(caught.value)
    (step / "net").mkdir(exist_ok=True)
    (step / "net/mp_rank_00_model_states.pt").touch()
    (step / "net.sft").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"without manifest\.json, which is"):
        init_weights.read_weights(step, "net")


def test_experts_are_refused(given: Path) -> None:
    model: Any = Odd(0.0)
    model.tilt.allreduce = False  # as DeepSpeed marks them
    engine: Any = SimpleNamespace(name="net", module=model, has_lora=False)
    with pytest.raises(ConfigError, match="not supported for DeepSpeed's experts"):
        init_weights.match_weights(engine, given)


def started(config: Config) -> list[dict[str, Tensor]]:
    """Trains. Returns the complete weights of each engine right after it was filled."""
    found = []
    load_weights = init_weights.load_weights

    def and_copy(engine: Engine, weights: init_weights.Weights) -> None:
        load_weights(engine, weights)
        found.append(dict(full_tensors(engine)))

    with patch.object(init_weights, "load_weights", and_copy):
        run_in_world(config)
    return found


def test_a_resumed_run_continues_and_its_teacher_starts_again(
    two_ranks: RankPool, tmp_path: Path, weights: dict[str, Tensor], given: Path
) -> None:
    teacher = {
        "ds_config": ROOT / "ds_configs/zero3.json",
        "role": "teacher",
        "init_from": given,
    }
    net = {"optimizer": {"lr": 0.01}}
    config = config_of(tmp_path, 2, given, net, engines={"wise": teacher})
    assert len(two_ranks.run(started, config)[0]) == 2
    trained = exported(config, 1)
    assert not torch.equal(trained["tilt"], weights["tilt"])
    gone = tmp_path / "gone.sft"
    config = config_of(tmp_path, 2, gone, engines={"wise": teacher}, run={"steps": 2})
    (wise,) = two_ranks.run(started, config)[0]
    assert all(torch.equal(wise[name], weights[name]) for name in weights)
    assert_equal(exported(config, 2), trained)
