"""The entry point as users start it: every launcher, every kind of stdin, every error."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.health.outcome import Outcome
from tests.support.helpers import ROOT
from tests.support.jobs import (
    LAUNCHERS,
    PYTHON,
    answers,
    ctl,
    job,
    log_of,
    ranks_of,
    start,
    steps_of,
    until,
    written_config,
)
from tests.support.quick import quick


def process_group(process: subprocess.Popen[str], directory: Path) -> None:
    os.killpg(process.pid, signal.SIGTERM)


def the_command(process: subprocess.Popen[str], directory: Path) -> None:
    process.send_signal(signal.SIGTERM)


def the_launcher(process: subprocess.Popen[str], directory: Path) -> None:
    parent = ranks_of(directory)[0].parent()
    assert parent is not None and parent.pid != process.pid
    parent.send_signal(signal.SIGTERM)


def ctrl_c(process: subprocess.Popen[str], directory: Path) -> None:
    os.killpg(process.pid, signal.SIGINT)


def launcher_is_killed(process: subprocess.Popen[str], directory: Path) -> None:
    process.kill()


def is_saved(directory: Path) -> dict[str, Any]:
    """The manifest of the checkpoint of the last step."""
    last = steps_of(directory)[-1]
    checkpoint = directory / f"runs/tiny/checkpoints/step-{last:08d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["step"] == last
    return manifest


def was_ended_by_a_signal(directory: Path) -> None:
    ended = Outcome.read(directory / "runs/tiny/ended.json")
    assert ended is not None and ended.kind == "signal" and ended.code in (130, 143)
    last = is_saved(directory)["step"]
    log = log_of(directory)
    assert f"saved {directory}/runs/tiny/checkpoints/step-{last:08d}\n" in log
    assert "saving a checkpoint before the run ends" not in log


def quit_by_ctl(process: subprocess.Popen[str], directory: Path) -> None:
    code, output = ctl(directory, "quit")
    assert code == 0 and "ending the run" in output


@pytest.mark.parametrize(
    ("launcher", "way"),
    quick(
        [*((launcher, quit_by_ctl) for launcher in LAUNCHERS), ("deepspeed", ctrl_c)],
        ("deepspeed", ctrl_c),
    ),
)
def test_every_front_under_every_launcher(
    tmp_path: Path, launcher: str, way: Callable[[subprocess.Popen[str], Path], None]
) -> None:
    """A pipe, `harness ctl`, a signal to the last rank, and finally a `quit` or Ctrl-C."""
    with job(launcher, tmp_path, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("lr 1e-4\nlr bad\nsave as one\n")
        process.stdin.flush()
        until(lambda: "save as one: done" in log_of(tmp_path), process)
        assert ctl(tmp_path, "lr", "x0.5") == (0, ctl_line(tmp_path, "lr x0.5", "net: lr 5e-05"))
        assert "net: lr held at 0.0001\nnet: lr x0.5" in ctl(tmp_path, "status")[1]
        assert ctl(tmp_path, "sav")[0] == 2
        assert ctl(tmp_path, "steps", "1")[0] == 1
        ranks = ranks_of(tmp_path)
        assert len(ranks) == (1 if launcher == "python" else 2)
        ranks[-1].send_signal(signal.SIGUSR1)
        until(lambda: "SIGUSR1: done" in log_of(tmp_path), process)
        way(process, tmp_path)
        until(lambda: not ranks_of(tmp_path))
        code = process.wait(timeout=60)
    assert (code == 0) == (way is quit_by_ctl), code
    assert is_saved(tmp_path)["world_size"] == len(ranks)
    if way is not quit_by_ctl:
        was_ended_by_a_signal(tmp_path)
    assert len(list((tmp_path / "runs/tiny/checkpoints").glob("step-*"))) == 3


def ctl_line(directory: Path, command: str, result: str) -> str:
    """What `harness ctl` prints for a command that is done, with its step from the history."""
    lines = (directory / "runs/tiny/commands.jsonl").read_text().splitlines()
    done = [r for r in map(json.loads, lines) if (r["text"], r["state"]) == (command, "done")]
    return f"step {done[-1]['step']}: {result}\n"


@pytest.mark.parametrize(
    ("launcher", "way"),
    [
        pytest.param("deepspeed", the_command, marks=pytest.mark.slow),
        pytest.param("deepspeed", the_launcher, marks=pytest.mark.slow),
        pytest.param("torchrun", the_command, marks=pytest.mark.slow),
        pytest.param("torchrun", launcher_is_killed, marks=pytest.mark.slow),
        pytest.param("python", process_group, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_job_with_a_checkpoint(
    tmp_path: Path, launcher: str, way: Callable[[subprocess.Popen[str], Path], None]
) -> None:
    with job(launcher, tmp_path) as process:
        way(process, tmp_path)
        until(lambda: not ranks_of(tmp_path))
        code = process.wait(timeout=60)
    assert code == 143 if launcher == "python" else code != 0, code
    was_ended_by_a_signal(tmp_path)


def test_a_second_signal_ends_a_hanging_rank(tmp_path: Path) -> None:
    """The other rank is stopped, so that no agreement is ever reached."""
    with job("torchrun", tmp_path) as process:
        first, second = ranks_of(tmp_path)
        second.suspend()
        first.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert first.is_running()
        first.send_signal(signal.SIGTERM)
        until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE)
        assert "SIGTERM again: exiting immediately" in log_of(tmp_path)
        process.kill()


@pytest.mark.slow
def test_without_stdin_it_trains_and_then_resumes_on_more_ranks(tmp_path: Path) -> None:
    assert start("python", tmp_path).returncode == 0
    ended = Outcome.read(tmp_path / "runs/tiny/ended.json")
    assert ended is not None and (ended.kind, ended.code, ended.step) == ("complete", 0, 4)
    again = start("torchrun", tmp_path, "--run.steps=6", "--metrics.tensorboard=true")
    assert again.returncode == 0
    assert "resumed from" in again.stderr and "step 4 of 6 on 2 ranks" in again.stderr
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert list((tmp_path / "runs/tiny/tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_on_a_gpu(tmp_path: Path, stage: int) -> None:
    ds_config = f"--engines.net.ds_config={ROOT}/ds_configs/zero{stage}.json"
    fp16 = "--engines.net.ds_overrides.fp16={enabled=true, initial_scale_power=8}"
    done = start("python", tmp_path, ds_config, fp16, "--run.steps=40")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "eval/" not in line]
    assert steps[0]["loss_scale"] == 256
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


@pytest.mark.skipif(shutil.which("nohup") is None, reason="nohup is not installed")
def test_in_the_background_under_nohup(tmp_path: Path) -> None:
    """SIGHUP does nothing; `harness ctl` works."""
    command = (
        f"nohup {sys.executable} {ROOT}/launch/train.py --config {written_config(tmp_path)} "
        "--run.steps=1000000 >out 2>&1 & wait $!"
    )
    with subprocess.Popen(["sh", "-c", command], cwd=tmp_path) as shell:
        until(lambda: answers(tmp_path), shell)
        (rank,) = ranks_of(tmp_path)
        rank.send_signal(signal.SIGHUP)
        assert ctl(tmp_path, "save")[0] == 0
        assert ctl(tmp_path, "quit")[0] == 0
        assert shell.wait(timeout=60) == 0
    assert "SIGHUP" not in log_of(tmp_path)


@pytest.mark.skipif(shutil.which("script") is None, reason="script is not installed")
def test_on_a_terminal(tmp_path: Path) -> None:
    """There is a bar, typed commands are executed, and when the terminal is gone the run saves."""
    command = (
        f"stty cols 120 rows 40; exec {sys.executable} {ROOT}/launch/train.py "
        f"--config {written_config(tmp_path)} --run.steps=1000000"
    )
    typescript = tmp_path / "typescript"
    with subprocess.Popen(
        ["script", "-qefc", command, str(typescript)],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as terminal:
        try:
            assert terminal.stdin is not None
            until(lambda: answers(tmp_path), terminal)
            terminal.stdin.write("lr 1e-4\n")
            terminal.stdin.flush()
            until(lambda: "stdin: lr 1e-4" in log_of(tmp_path), terminal)
            until(lambda: "/1000000 [" in typescript.read_text(), terminal)
            terminal.kill()
            until(lambda: not ranks_of(tmp_path))
        finally:
            for rank in ranks_of(tmp_path):
                rank.kill()
    assert "SIGHUP: done: ending the run" in log_of(tmp_path)
    assert is_saved(tmp_path)


def test_an_error_on_one_rank_is_printed(tmp_path: Path) -> None:
    """Also if rank 0 has no error, and if RANK is not a number. Each waits for rank 0 first."""
    command = [*PYTHON, ROOT / "launch/train.py", "--config", tmp_path / "missing.toml"]
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    processes = {
        rank: subprocess.Popen(
            command, env=os.environ | world | {"RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("1", "one")
    }
    for rank, process in processes.items():
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2 and "Traceback" not in stderr
        assert stderr.startswith(f"error on rank {rank}: "), stderr


def test_an_exception_in_a_worker_ends_the_run(tmp_path: Path) -> None:
    """Although the worker has copies of the rank's descriptors."""
    task = f"--task.path={ROOT}/tests/tasks/bad_sample_task.py"
    done = start("python", tmp_path, task, "--run.steps=100", "--data.workers=1")
    assert done.returncode == 1
    assert "ValueError: sample 50 cannot be read" in done.stderr
    assert "ValueError: sample 50 cannot be read" in log_of(tmp_path)


def test_a_port_in_use_is_one_message(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [*PYTHON, ROOT / "launch/train.py", "--config", written_config(tmp_path)],
            env=os.environ | world | {"MASTER_PORT": port},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"error: port {port} of " in done.stderr and "--master_port" in done.stderr


@pytest.mark.parametrize(
    ("launcher", "word", "code", "message"),
    [
        ("python", "--run.stesp=1", 2, "run.stesp (command line): unknown key (did you mean"),
        (
            "python",
            "--engines.net.ds_overrides.zero_optimization.reduce_bucket_size=-1",
            2,
            "zero_optimization.reduce_bucket_size: found -1: Input should be greater than 0",
        ),
        pytest.param(
            "deepspeed", "--task.path=missing.py", 2, "missing.py", marks=pytest.mark.slow
        ),
        *(
            pytest.param(
                launcher,
                "--task.args={raise=true}",
                1,
                "RuntimeError: the task is unwell",
                marks=pytest.mark.slow if launcher == "deepspeed" else (),
            )
            for launcher in ("deepspeed", "python")
        ),
        pytest.param(
            "torchrun",
            "--task.args={samples=0}",
            1,
            "train_data: Points has no items",
            marks=pytest.mark.slow,
        ),
        ("python", "--run.resume=broken", 1, "checkpoint broken: manifest.json is damaged"),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    tmp_path: Path,
    launcher: str,
    word: str,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And an outcome where the environment says, though there is no run directory."""
    monkeypatch.setenv("HARNESS_OUTCOME", str(tmp_path / "outcome.json"))
    (tmp_path / "outcome.json").write_text('{"kind": "complete", "code": 0}')  # of an earlier start
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/manifest.json").write_text("{}")
    done = start(launcher, tmp_path, word)
    assert done.returncode == (1 if launcher == "torchrun" else code)
    assert done.stderr.count(message) == 1 and done.stderr.count("error: ") == 1, done.stderr
    # torchrun itself ends with a traceback; a task's own failure shows where it failed.
    tracebacks = int(launcher == "torchrun" or "raise" in word)
    assert done.stderr.count("Traceback") <= tracebacks, done.stderr
    assert not (tmp_path / "runs").exists()
    ended = Outcome.read(tmp_path / "outcome.json")
    assert ended is not None and ended.code == code and message in ended.reason
    assert ended.kind == ("config" if code == 2 else "checkpoint" if "resume" in word else "task")
