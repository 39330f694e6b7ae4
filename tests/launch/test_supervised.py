"""`harness run` around the real launchers."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.distributed import free_port
from tests.support.helpers import ROOT
from tests.support.jobs import (
    BIN,
    LAUNCHERS,
    answers,
    log_of,
    ranks_of,
    steps_of,
    until,
    written_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


SECONDS_TO_START = 300.0
"""On a machine that does much else; the imports alone take 10 on one that does not."""


@contextmanager
def supervised(launcher: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """An endless run under `harness run`, once it takes steps; commands can be typed into it."""
    launch = [str(free_port()) if word == "0" else word for word in LAUNCHERS[launcher]]
    job = [str(ROOT / "launch/train.py"), "--config", str(written_config(directory))]
    job += ["--run.steps=1000000", "--trainer.save_every=50", "--checkpoint.keep_last=2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with (
        (directory / "output").open("w") as log,
        subprocess.Popen(
            [BIN / "harness", "run", "--backoff", "0", "--", *launch, *job],
            env=environment | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            until(lambda: is_training(directory), process, SECONDS_TO_START)
            yield process
        finally:
            for left in ranks_of(directory):
                left.kill()
            process.kill()


def is_training(directory: Path) -> bool:
    checkpoints = directory / "runs/tiny/checkpoints"
    return answers(directory) and any(checkpoints.glob("step-????????/manifest.json"))


def restarted(directory: Path, process: subprocess.Popen[str], times: int) -> None:
    """Waits until the run has been started again, and trains."""
    has_resumed = f"restart {times} of 10: ", "resumed from "
    until(lambda: _after(log_of(directory), *has_resumed), process, SECONDS_TO_START)
    until(lambda: answers(directory), process)


def _after(text: str, first: str, second: str) -> bool:
    return second in text.partition(first)[2]


def rank(directory: Path) -> None:
    ranks_of(directory)[-1].kill()


def launchers_child(directory: Path) -> None:
    """DeepSpeed's launch.py, whose death `deepspeed` reports as success; torchrun itself."""
    parent = ranks_of(directory)[0].parent()
    assert parent is not None
    parent.kill()


def a_signal(directory: Path) -> None:
    ranks_of(directory)[0].send_signal(signal.SIGTERM)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_it_survives_ranks_launchers_and_signals(tmp_path: Path, launcher: str) -> None:
    """And it ends with the run, by a typed command; no step is lost or taken twice."""
    faults = [rank, a_signal] if launcher == "python" else [rank, launchers_child, a_signal]
    with supervised(launcher, tmp_path) as process:
        for times, fault in enumerate(faults, 1):
            fault(tmp_path)
            restarted(tmp_path, process, times)
        assert process.stdin is not None
        process.stdin.write("quit\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == 0
        assert not ranks_of(tmp_path)
    assert "frame #" not in (tmp_path / "output").read_text()  # no stacks of C++
    assert log_of(tmp_path).count("supervisor WARNING restart ") == len(faults)
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path: Path, launcher: str) -> None:
    with supervised(launcher, tmp_path) as process:
        process.send_signal(signal.SIGUSR1)
        until(lambda: "SIGUSR1: done" in log_of(tmp_path), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert not ranks_of(tmp_path)
    last = steps_of(tmp_path)[-1]
    assert (tmp_path / f"runs/tiny/checkpoints/step-{last:08d}/manifest.json").exists()
    assert "supervisor WARNING no restart: signal at step" in log_of(tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_its_supervisor_a_run_saves_and_ends(tmp_path: Path, launcher: str) -> None:
    with supervised(launcher, tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not ranks_of(tmp_path))
        last = steps_of(tmp_path)[-1]
        assert (tmp_path / f"runs/tiny/checkpoints/step-{last:08d}/manifest.json").exists()
        process.wait()


def test_a_mistake_in_the_config_is_not_tried_again(tmp_path: Path) -> None:
    """Under torchrun, whose exit code is 1."""
    job = [str(ROOT / "launch/train.py"), "--config", str(written_config(tmp_path))]
    done = subprocess.run(
        [BIN / "harness", "run", "--", *LAUNCHERS["torchrun"], *job, "--run.stesp=1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no restart: config" in done.stderr
