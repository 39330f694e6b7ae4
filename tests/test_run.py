"""Complete runs on two real ranks, at every ZeRO stage, against a plain PyTorch loop."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from harness import distributed
from harness.config import Config
from harness.config.command_line import parse_args
from harness.config.sections import EventConfig, merge
from harness.data.sampler import RandomSampler
from harness.engine.attributes import Submodules
from harness.engine.engine import Engine
from harness.errors import TaskError
from harness.optim.scheduler import Schedule, build_scheduler
from harness.run import run_in_world
from harness.task import Task, feed, load_task
from harness.testing.pool import RankPool
from harness.trainer import Trainer
from tests.support.helpers import (
    error_of,
    exported,
    exports,
    log_text,
    losses,
    records,
    tiny_config,
)
from tests.support.quick import quick

STAGES = [0, 1, 2, 3]


class Bare:
    """A bare model in place of an engine, for the task's own feeder."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def gather_attribute(self, name: str, kind: type) -> dict[str, Any]:
        return {"": vars(self.module).pop(name)}


def plain_loop(
    config: Config, world_size: int, accumulation: int = 1
) -> tuple[list[float], nn.Module]:
    """The losses of one process on the same global batches, and the trained model."""
    ((name, settings),) = config.engines.items()
    assert settings.optimizer is not None
    distributed.seed_everything(config.run.seed)
    task = load_task(config)
    model = task.models[name]
    arguments: dict[str, Any] = settings.optimizer.args | {"lr": settings.optimizer.lr}
    optimizer = torch.optim.AdamW(model.parameters(), **arguments)
    scheduler = build_scheduler(optimizer, Schedule(settings.scheduler, config.run.steps))
    draws = RandomSampler(len(task.train_data), seed=config.run.seed).stream()
    size = config.data.micro_batch_size * world_size * accumulation
    found = []
    for _ in range(config.run.steps):
        batch = task.collate([task.train_data[next(draws)] for _ in range(size)])
        loss, _ = task.feeder(Bare(model), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, model


def byte_lm_config(directory: Path, stage: int, steps: int = 20) -> Config:
    words = [
        f"--engines.lm.ds_config=ds_configs/zero{stage}.json",
        f"--run.dir={directory}",
        f"--run.steps={steps}",
        "--trainer.eval_every=0",
        "--task.args.eval_windows=2",
        "--task.args.sample_bytes=5",
        "--data.micro_batch_size=2",
        "--control.stdin=false",
    ]
    config = parse_args(["--config", "launch/tasks/byte_lm.toml", *words])
    return config.model_copy(update={"events": [EventConfig(command="sample def f", at=2)]})


@pytest.mark.parametrize(
    ("stage", "steps"), quick([*((stage, 20) for stage in STAGES), (3, 8)], (3, 8))
)
def test_the_default_task_equals_a_plain_loop(
    two_ranks: RankPool, tmp_path: Path, stage: int, steps: int
) -> None:
    config = byte_lm_config(tmp_path, stage, steps)
    two_ranks.run(run_in_world, config)
    expected, _ = plain_loop(config, world_size=2)
    assert len(expected) == steps
    assert losses(config) == pytest.approx(expected, abs=1e-5, rel=0)
    assert "sample def f: done: def f" in (config.run_dir / "log.txt").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_weights_equal_a_plain_loop(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = tiny_config(tmp_path, stage, run={"steps": 20})
    two_ranks.run(run_in_world, config)
    expected, model = plain_loop(config, world_size=2)
    assert losses(config) == pytest.approx(expected, abs=1e-5, rel=0)
    plain = dict(model.state_dict())
    torch.testing.assert_close(exported(config), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_accumulation_equals_larger_batches(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    engine = {"ds_overrides": {"gradient_accumulation_steps": 3}}
    config = tiny_config(tmp_path, stage, engines={"net": engine})
    two_ranks.run(run_in_world, config)
    expected, _ = plain_loop(config, world_size=2, accumulation=3)
    assert losses(config) == pytest.approx(expected, abs=1e-5, rel=0)
    last = records(config)[-1]
    assert (last["step"], last["samples"], last["epoch"]) == (6, 6 * 3 * 2 * 4, 1)


@pytest.mark.parametrize("stage", quick(STAGES, 1, 3))
def test_bf16_learns(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    engine = {"ds_overrides": {"bf16": {"enabled": True}}}
    config = tiny_config(tmp_path, stage, run={"steps": 40}, engines={"net": engine})
    two_ranks.run(run_in_world, config)
    assert losses(config)[-1] < 0.8 * losses(config)[0]
    weights = exported(config)
    assert weights.pop("scale").dtype == torch.float32  # DeepSpeed leaves buffers as they are
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}


def test_a_record_has_every_number(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    two_ranks.run(run_in_world, config)
    for step, record in enumerate(records(config), start=1):
        assert record["step"] == step
        assert (record["samples"], record["tokens"]) == (8 * step, 0)
        assert record["lr"] == 1e-2 and record["loss_scale"] == 1
        assert record["grad_norm"] > 0 and 0 <= record["accuracy"] <= 1
        assert record["tokens_per_s"] == 0  # rows of numbers
        assert record["samples_per_s"] == pytest.approx(8 / record["step_time_s"])
        phases = [record[f"{of}_time_s"] for of in ("data", "forward", "backward", "optimizer")]
        assert min(phases) > 0 and sum(phases) == pytest.approx(record["step_time_s"])
        assert record["own_time_max_s"] <= record["step_time_max_s"]
        assert abs(record["time"] - time.time()) < 600
        assert ("host_memory_bytes" in record) or step > 1


@pytest.mark.parametrize("stage", STAGES)
def test_grad_norm_is_the_plain_one(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    config = tiny_config(tmp_path, stage, run={"steps": 1})
    two_ranks.run(run_in_world, config)
    distributed.seed_everything(0)
    task = load_task(config)
    model = task.models["net"]
    draws = RandomSampler(len(task.train_data)).stream()
    model(*task.collate([task.train_data[next(draws)] for _ in range(8)]))
    loss: Any = model.loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert records(config)[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_evaluation_counts_each_sample_once(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = tiny_config(tmp_path, stage, trainer={"eval_every": 2}, run={"steps": 4})
    two_ranks.run(run_in_world, config)
    found = records(config, "eval/")
    assert [record["step"] for record in found] == [0, 2, 4]
    task = load_task(config)  # its 10 held-out samples are 3 uneven batches on 2 ranks
    model = task.models["net"]
    model.load_state_dict(exported(config))
    assert task.eval_data is not None
    with torch.no_grad():
        model(*task.collate([task.eval_data[index] for index in range(10)]))
    loss: Any = model.loss
    assert found[-1]["eval/loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_two_engines_and_a_teacher_are_independent(two_ranks: RankPool, tmp_path: Path) -> None:
    alone = tiny_config(tmp_path / "alone")
    two_ranks.run(run_in_world, alone)
    one = alone.engines["net"]
    table = one.model_dump()
    teacher = {"ds_config": table["ds_config"], "role": "teacher"}
    engines = {"net": table, "other": table | {"ds_overrides": {"zero_optimization": {"stage": 2}}}}
    config = tiny_config(tmp_path / "many", engines=engines | {"wise": teacher})
    two_ranks.run(run_in_world, config)
    assert [record["net/loss"] for record in records(config)] == losses(alone)
    assert len({record["other/loss"] for record in records(config)}) == 6
    assert "wise/loss" not in records(config)[0]
    assert sorted(path.name for path in exports(config).iterdir()) == ["net.sft", "other.sft"]


@pytest.mark.parametrize("sampler", ["ordered", "pool", "batched"])
def test_every_sampler_and_workers(two_ranks: RankPool, tmp_path: Path, sampler: str) -> None:
    data = {"sampler": sampler, "max_tokens": 10 if sampler == "batched" else 0}
    inline = tiny_config(tmp_path / "inline", data=data)
    two_ranks.run(run_in_world, inline)
    workers = tiny_config(tmp_path / "workers", data=data | {"workers": 1})
    two_ranks.run(run_in_world, workers)
    assert losses(inline) == losses(workers)
    assert all(math.isfinite(loss) for loss in losses(inline))


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1.0, 4), (2.2, 9)])
def test_a_run_of_some_epochs(
    two_ranks: RankPool, tmp_path: Path, epochs: float, steps: int
) -> None:
    """96 samples in steps of 4 on 2 ranks, 3 times accumulated."""
    config = tiny_config(tmp_path, **json_of(gradient_accumulation_steps=3))
    run = {"name": "tiny", "dir": tmp_path, "epochs": epochs, "timeout_s": 30}
    two_ranks.run(run_in_world, Config.model_validate(config.model_dump() | {"run": run}))
    assert len(records(config)) == steps
    assert records(config)[-1]["epoch"] == steps * 24 // 96
    assert f"steps = {steps}\n" in (config.run_dir / "config.toml").read_text()


def test_epochs_of_unknown_length_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    table = tiny_config(tmp_path, data={"sampler": "batched"}).model_dump()
    table["run"] = {"name": "tiny", "dir": tmp_path, "epochs": 1}
    errors = two_ranks.run(error_of, Config.model_validate(table))
    assert (
        errors
        == [
            "run.epochs: data.sampler = 'batched' makes micro-batches of different sizes: set "
            "run.steps instead"
        ]
        * 2
    )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"steps = 5 and epochs = 1 are both set: remove one"):
        tiny_config(tmp_path, run={"steps": 5, "epochs": 1})


def test_events_of_the_config_are_executed(two_ranks: RankPool, tmp_path: Path) -> None:
    events = [{"command": "lr x0.5", "every": 2}, {"command": "save as third", "at": 3}]
    events.append({"command": "export", "at": 4})
    config = tiny_config(tmp_path, events=events, run={"steps": 4})
    two_ranks.run(run_in_world, config)
    assert [record["lr"] for record in records(config)] == [0.01, 0.01, 0.005, 0.005]
    assert (config.run_dir / "checkpoints/step-00000003-third").is_dir()
    assert (config.run_dir / "log.txt").read_text().count(
        "INFO exported "
    ) == 1  # not at the end again


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task": {"args": {"raise": True}}}, "the task is unwell"),
        ({"task": {"args": {"samples": 0}}}, "train_data: Points has no items"),
        ({"task": {"args": {"eval_samples": 0}}, "trainer": {"eval_every": 1}}, "no eval_data"),
        ({"engines": {"net": {"optimizer": {"lr2": 1}}}}, "unknown key 'lr2'"),
        (
            {"engines": {"net": {"optimizer": {"name": "torch:float32"}}}},
            "is not a torch.optim.Optimizer",
        ),
        (
            {"engines": {"net": {"scheduler": {"name": "cosine", "warmup": -5}}}},
            "warmup = -5, expected whole steps, or a ratio of the total steps below 1",
        ),
        ({"engines": {"net": {"optimizer": {"name": "adam"}}}}, "did you mean 'adamw'"),
        ({"engines": {"net": {"scheduler": {"name": "cosin"}}}}, "did you mean 'cosine'"),
        ({"run": {"resume": "/no/where"}}, "/no/where: no such file or directory"),
        ({"events": [{"command": "exprt", "at": 2}]}, "events.0.command: 'exprt': unknown command"),
    ],
)
def test_a_mistake_is_reported_on_all_ranks_before_anything_is_written(
    two_ranks: RankPool, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    errors = two_ranks.run(error_of, tiny_config(tmp_path, **overrides))
    assert all(message in text for text in errors)
    assert list(tmp_path.iterdir()) == []


def json_of(**settings: Any) -> dict[str, Any]:
    """Overrides of DeepSpeed's JSON."""
    return {"engines": {"net": {"ds_overrides": settings}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zero_optimization": {"reduce_bucket_size": -5}},
            "zero_optimization.reduce_bucket_size: found -5: Input should be greater than 0",
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "zero_optimization: Value error, compute_grad_norm=false is supported only with ZeRO",
        ),
        ({"gradient_allreduce_op": "max"}, "Invalid gradient_allreduce_op"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "cannot be simultaneously ena"),
    ],
    ids=str,
)
def test_what_deepspeed_refuses_is_one_message(
    two_ranks: RankPool, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config = tiny_config(tmp_path, 0, **json_of(**settings))
    errors = two_ranks.run(error_of, config)
    where = f"engines.net: ds_config {config.engines['net'].ds_config} with ds_overrides: "
    assert all(text.startswith(where) and message in text for text in errors), errors
    assert list(tmp_path.iterdir()) == []


def error_without_fp16(config: Config) -> tuple[str, str]:
    """The error on a device that does not compute in fp16; and if only starting shows it."""
    from deepspeed.accelerator import get_accelerator

    with patch.object(type(get_accelerator()), "is_fp16_supported", return_value=False):
        early = error_of(config)
        with patch("harness.engine.build.check_engines"):
            return early, error_of(config)


def test_fp16_on_a_device_without_it_is_one_message(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, 2, **json_of(fp16={"enabled": True}))
    for early, late in two_ranks.run(error_without_fp16, config):
        assert early.endswith("fp16.enabled: this cpu does not compute in fp16")
        assert late.startswith("engines.net: ds_config ")
        assert late.endswith("DeepSpeed: Type fp16 is not supported on your device.")


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeeds_profilers_change_nothing(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    plain = tiny_config(tmp_path / "plain", stage)
    profiler = {"enabled": True, "profile_step": 2, "output_file": str(tmp_path / "flops.txt")}
    settings = json_of(wall_clock_breakdown=True, flops_profiler=profiler)
    profiled = tiny_config(tmp_path / "profiled", stage, **settings)
    for config in (plain, profiled):
        two_ranks.run(run_in_world, config)
    assert losses(profiled) == losses(plain)
    assert "DeepSpeed Flops Profiler" in (tmp_path / "flops.txt").read_text()


def test_deepspeeds_default_clipping_is_reported(two_ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("{}")
    reported = {}
    for name, settings in {"default": {}, "own": {"gradient_clipping": 1.0}}.items():
        engine = {"ds_config": path, "ds_overrides": settings}
        config = tiny_config(tmp_path / name, engines={"net": engine}, run={"steps": 1})
        two_ranks.run(run_in_world, config)
        reported[name] = "engine net: gradients are clipped to the norm 1, Deep" in log_text(config)
    assert reported == {"default": True, "own": False}


def train_until(config: Config, error: type[Exception]) -> None:
    """A run whose loop fails on every rank."""
    with (
        patch.object(Trainer, "loop", side_effect=error("it is unwell")),
        pytest.raises(error, match="it is unwell"),
    ):
        run_in_world(config)


@pytest.mark.parametrize("error", [TaskError, ZeroDivisionError])
def test_the_log_has_the_reason_of_an_end(
    two_ranks: RankPool, tmp_path: Path, error: type[Exception]
) -> None:
    """Once, as all ranks fail alike; with a traceback, unless the message is for the user."""
    config = tiny_config(tmp_path)
    two_ranks.run(train_until, config, error)
    text = log_text(config)
    reasons = [line for line in text.splitlines() if "ERROR" in line and "it is unwell" in line]
    assert [f"rank {rank} ERROR" in " ".join(reasons) for rank in range(2)] == [True, False]
    assert text.count("Traceback") == (error is ZeroDivisionError)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(()), "the feeder returned Tensor, expected (loss, stats)"),
        ((torch.ones(3), {}), "the loss [3], expected a scalar tensor"),
        ((1.0, {}), "the loss float, expected a scalar tensor"),
        ((torch.ones(()), {"lr": 1.0}), "stats with reserved names: ['lr']"),
        ((torch.ones(()), {"word": "x"}), "the stat 'word' = 'x', expected a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_feeder_that_breaks_its_contract_is_an_error(returned: Any, message: str) -> None:
    task = Task(models={}, train_data=[], feeder=lambda engine, batch: returned)
    engine: Any = None
    with pytest.raises(TaskError) as caught:
        feed(task, engine, None)
    assert message in str(caught.value)


def test_a_config_attribute_called_loss_is_left_alone() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = "ce"

    model = nn.Sequential(Named(), Named())
    model.loss = torch.ones(())
    engine = Engine.__new__(Engine)
    engine.ds = SimpleNamespace(module=model)
    engine._submodules = Submodules(model)
    assert engine.gather_attribute("loss", torch.Tensor) == {"": torch.ones(())}
    assert model[0].loss == "ce" and not hasattr(model, "loss")
    assert engine.dispatch_attribute("loss", "mse") == 2 and model[1].loss == "mse"


def error_with_another_config(config: Config) -> str:
    """Rank 1 has other settings."""
    if distributed.global_rank() == 1:
        optimizer = {"optimizer": {"lr": 0.5}}
        config = Config.model_validate(merge(config.model_dump(), {"engines": {"net": optimizer}}))
    return error_of(config)


def error_with_another_json(config: Config, path: Path) -> str:
    """Rank 1's file for DeepSpeed differs."""
    if distributed.global_rank() == 1:
        settings = config.engines["net"].deepspeed()
        path.write_text(json.dumps(settings | {"gradient_clipping": 0.5}))
        changed = {"engines": {"net": {"ds_config": path}}}
        config = Config.model_validate(merge(config.model_dump(), changed))
    return error_of(config)


def test_nan_in_the_config_is_the_same_on_every_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    args = {"nothing": math.nan, "list": [1, {"a": math.nan}]}
    assert two_ranks.run(run_in_world, tiny_config(tmp_path, task={"args": args})) == [0, 0]


def test_different_configs_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, 2)
    errors = two_ranks.run(error_with_another_config, config)
    assert all("engines.net.optimizer.lr is 0.5 on rank 1, and 0.01 on rank 0" in e for e in errors)
    errors = two_ranks.run(error_with_another_json, config, tmp_path / "other.json")
    assert all("engines.net.ds_config gradient_clipping is 0.5 on rank 1" in e for e in errors)
    assert not config.run_dir.exists()
