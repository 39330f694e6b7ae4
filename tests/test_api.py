"""`harness.train` in this process: what it returns, raises, and leaves as it was."""

import asyncio
import gc
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness import Config, Result, Task, command, launch, train
from harness.config.command_line import parse_args
from harness.errors import CommandError, ConfigError, HarnessError, TaskError
from tests.support.helpers import ROOT


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.loss = nn.functional.mse_loss(self.net(x), y)


def build(config: Config | None = None) -> Task:
    x = torch.randn(64, 2)
    data = torch.utils.data.TensorDataset(x, x.prod(1, keepdim=True))
    return Task(models={"net": Product()}, train_data=data, eval_data=data)


def tables(directory: Path, stage: int = 0, **run: Any) -> dict[str, Any]:
    """A config as a notebook has it."""
    engine = {
        "ds_overrides": {"zero_optimization": {"stage": stage}},
        "optimizer": {"name": "adamw"},
    }
    return {
        "run": {"dir": str(directory), "steps": 4, "timeout_s": 30, **run},
        "engines": {"net": engine},
        "data": {"micro_batch_size": 4},
    }


def state_of_process() -> dict[str, Any]:
    """What a run may change in its process."""
    gc.collect()
    return {
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(n) for n in signal.valid_signals()],
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "torch": torch.get_rng_state().tolist(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "native threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "hook": sys.excepthook,
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "log": [logging.getLogger("harness").handlers, logging.getLogger("harness").propagate],
        "path": list(sys.path),
        "group": dist.is_initialized(),
    }


def test_a_run_in_an_event_loop_returns_what_it_left(tmp_path: Path) -> None:
    async def cell() -> Result:
        return train(tables(tmp_path, name="first"), build)

    result = asyncio.run(cell())
    assert result.run_dir == tmp_path / "first" and result.ended == "complete"
    assert result.checkpoint == result.run_dir / "checkpoints/step-00000004"
    assert result.exports == result.run_dir / "exports/step-00000004"
    assert result.metrics["step"] == 4 and result.metrics["loss"] > 0
    assert result.best is not None and result.best["step"] == 4
    assert result.best["eval/loss"] == result.metrics["eval/loss"]
    assert (result.run_dir / "exports/step-00000004/net.sft").is_file()


@pytest.mark.parametrize("runs", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_runs_leave_the_process_as_it_was(tmp_path: Path, runs: int) -> None:
    train(tables(tmp_path), build)  # what libraries keep is there after the first
    all_reduce: Any = sys.modules["torch.distributed.nn.functional"].all_reduce
    assert all_reduce.__defaults__[1] is None  # not its group
    before = state_of_process()
    results = [train(tables(tmp_path, stage=number % 4), build) for number in range(runs)]
    assert state_of_process() == before
    assert len({result.run_dir for result in results}) == runs  # each is a run of its own
    losses = [result.metrics["loss"] for result in results]
    assert losses == pytest.approx([losses[0]] * runs, rel=1e-6)


def test_a_named_run_resumes_and_is_over_once_complete(tmp_path: Path) -> None:
    at_once = train(tables(tmp_path, name="at_once", steps=6), build)
    for steps in (4, 6, 6):
        result = train(tables(tmp_path, name="split"), build, {"run.steps": steps})
    assert result.metrics["loss"] == at_once.metrics["loss"]
    assert result.metrics["step"] == 6


def test_a_task_that_is_given_is_trained_in_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, fast = build(), {"engines.net.optimizer.lr": 0.02}
    train(tables(tmp_path), build)  # what libraries keep is there after the first
    before = state_of_process()
    first, second, _ = (train(tables(tmp_path, stage), task, fast) for stage in range(3))
    assert second.metrics["eval/loss"] < first.metrics["eval/loss"]
    assert state_of_process() == before  # also while the task lives
    pickle.dumps(task.models)  # DeepSpeed is off its modules
    train(tables(tmp_path, stage=3), task)
    with pytest.raises(TaskError, match="model 'net': an earlier run at ZeRO stage 3 has left it"):
        train(tables(tmp_path, stage=3), task)


def test_what_a_run_freezes_is_not_frozen_after_it(tmp_path: Path) -> None:
    task = Task(models={"net": Product(), "other": Product()}, train_data=[(torch.ones(2),) * 2])
    engines = {name: tables(tmp_path)["engines"]["net"] for name in task.models}
    config = tables(tmp_path) | {"engines": engines}
    train(tables(tmp_path), build)  # what libraries keep is there after the first
    before = state_of_process()
    frozen = {"engines.net.frozen": ["net.0"], "engines.other.frozen": [".*"]}
    with pytest.raises(ConfigError, match=r"engines.other: the model has no trainable parameter"):
        train(config, task, frozen)
    assert all(p.requires_grad for model in task.models.values() for p in model.parameters())
    assert state_of_process() == before  # the first engine is closed


def test_a_file_of_a_task_is_imported_again(tmp_path: Path) -> None:
    """As after a change to it; and another folder may have one of the same name."""
    engines = {"net": tables(tmp_path)["engines"]["net"]}
    for folder, text in (("a", "first"), ("a", "second"), ("b", "third")):
        file = tmp_path / folder / "own_task.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"def build(config):\n    raise ValueError({text!r})\n")
        os.utime(file, (0, hash(text) % 2**30))  # else Python takes the bytecode of before
        with pytest.raises(TaskError, match=f"ValueError: {text}"):
            train({"engines": engines}, file)


def test_errors_have_the_text_of_the_command_line(tmp_path: Path) -> None:
    toml = tmp_path / "small.toml"
    toml.write_text(f'[task]\npath = "{ROOT}/tests/tasks/tiny_task.py"\n[run]\nstepz = 3\n')
    with pytest.raises(ConfigError) as expected:
        parse_args(["--config", str(toml)])
    with pytest.raises(ConfigError) as found:
        train(toml)
    assert "run.stepz: unknown key (did you mean 'steps'?)" in str(expected.value)
    assert str(found.value) == str(expected.value)
    with pytest.raises(ConfigError, match=r"config: found '\$NO_SUCH/a.toml': the environment"):
        train("$NO_SUCH/a.toml")
    with pytest.raises(ConfigError, match=r"task.path: missing, and no task is given"):
        train(tables(tmp_path))
    with pytest.raises(ConfigError, match=r"run.steps \(overrides\): found 0"):
        train(tables(tmp_path), build, {"run.steps": 0})


def test_arguments_of_another_kind_are_refused(tmp_path: Path) -> None:
    config, wrong = tables(tmp_path), cast(Any, 5)
    with pytest.raises(ConfigError, match=r"config: found 5, expected tables, a Config, or paths"):
        train(wrong, build)
    with pytest.raises(ConfigError, match=r"config: found \[\], expected"):
        train([], build)
    with pytest.raises(ConfigError, match=r"task: found 5, expected a Task, a function build"):
        train(config, wrong)
    with pytest.raises(ConfigError, match=r"overrides: found 5, expected tables"):
        train(config, build, wrong)
    with pytest.raises(ConfigError, match=r"ranks = 0: expected at least 1"):
        launch(build, ranks=0, config=config)


def test_an_interrupt_saves_and_is_raised(tmp_path: Path) -> None:
    def interrupted(engine: Any, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return engine.module.net(batch[0]).sum(), {}

    x = torch.zeros(8, 2)
    data = torch.utils.data.TensorDataset(x)
    task = Task(models={"net": Product()}, train_data=data, feeder=interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tables(tmp_path, name="stopped", steps=1000), task)
    assert list((tmp_path / "stopped/checkpoints").glob("step-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_a_thread_takes_commands(tmp_path: Path) -> None:
    """As a notebook changes a run: the cell that trains has returned."""
    config = tables(tmp_path, name="live", steps=10**6)
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(train(config, build)), daemon=True)
    thread.start()
    with pytest.raises(CommandError, match=r"'lr fast': rejected: .* a learning rate is"):
        command(tmp_path / "live", "lr fast", wait_s=60)  # it has not started yet
    with pytest.raises(HarnessError, match="another run is in progress in this process: wait"):
        train(tables(tmp_path, name="second"), build)
    answers = [command(tmp_path / "live", line) for line in ("lr 0.5", "quit")]
    thread.join()
    assert answers == ["net: lr 0.5", "ending the run"]
    assert results[0].ended == "quit" and results[0].metrics["lr"] == 0.5


def test_import_harness_imports_no_torch() -> None:
    code = "import harness, sys; harness.Config; print([m for m in ('torch', 'deepspeed', 'numpy')"
    code += " if m in sys.modules], hasattr(harness, 'no_such_name'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[] False\n"
