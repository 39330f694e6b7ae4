"""Runs as users start them: the entry point under a launcher, and `harness ctl` beside it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil

from harness.control.client import Client, NoAnswer
from harness.distributed import free_port
from tests.support.helpers import ROOT

BIN = Path(sys.executable).parent
PYTHON = [sys.executable]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "0"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = {"python": PYTHON, "deepspeed": DEEPSPEED, "torchrun": TORCHRUN}


def written_config(directory: Path) -> Path:
    """The tiny task's config, as a file in `directory`."""
    toml = directory / "tiny.toml"
    toml.write_text(
        f"""
        [run]
        dir = "{directory}/runs"
        steps = 4
        timeout_s = 60
        [task]
        path = "{ROOT}/tests/tasks/tiny_task.py"
        [engines.net]
        ds_config = "{ROOT}/ds_configs/zero2.json"
        optimizer = {{ name = "adamw", lr = 1e-2 }}
        """
    )
    return toml


def popen(launcher: str, directory: Path, *words: str, **files: Any) -> subprocess.Popen[str]:
    """Starts the entry point on the tiny task's config below `directory`."""
    launch = [str(free_port()) if word == "0" else word for word in LAUNCHERS[launcher]]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    toml = written_config(directory)
    return subprocess.Popen(
        [*launch, str(ROOT / "launch/train.py"), "--config", str(toml), *words],
        env=environment | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        cwd=directory,
        text=True,
        **files,
    )


def start(
    launcher: str, directory: Path, *words: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the entry point, and waits for its end."""
    pipe = subprocess.PIPE
    source = subprocess.DEVNULL if stdin is None else pipe
    with popen(launcher, directory, *words, stdin=source, stdout=pipe, stderr=pipe) as process:
        try:
            out, err = process.communicate(stdin, timeout=100)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ctl(directory: Path, *words: str) -> tuple[int, str]:
    """What `harness ctl` answers of the run below `directory`: `(exit code, output)`."""
    done = subprocess.run(
        [BIN / "harness", "ctl", directory / "runs/tiny", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def answers(directory: Path) -> bool:
    """Whether the run below `directory` answers commands."""
    try:
        with closing(Client(directory / "runs/tiny")) as client:
            return [answer.state for answer in client.send("status")] == ["done"]
    except NoAnswer:
        return False


@contextmanager
def job(
    launcher: str, directory: Path, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """An endless run, once it takes commands and steps. What is left of it is killed at the end."""
    with (
        (directory / "output").open("w") as log,
        popen(
            launcher,
            directory,
            "--run.steps=1000000",
            "--data.workers=1",  # whom no signal may end
            stdin=stdin,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            until(lambda: answers(directory), process)
            until(lambda: bool(steps_of(directory)), process)  # before the first, nothing is saved
            yield process
        finally:
            for rank in ranks_of(directory):
                rank.kill()
            process.kill()


def until(
    condition: Callable[[], bool],
    process: subprocess.Popen[Any] | None = None,
    seconds: float = 90,
) -> None:
    """Waits for a condition, as long as the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.1)


def ranks_of(directory: Path) -> list[psutil.Process]:
    """The ranks of the run below `directory`, by rank; without their data-loader workers."""
    found = {}
    for process in psutil.process_iter(["cmdline", "environ", "ppid"]):
        words = process.info["cmdline"] or []
        ended = process.info["environ"] is None  # while it was looked at
        is_ours = str(directory / "tiny.toml") in words
        if is_ours and str(ROOT / "launch/train.py") in words[1:3] and not ended:
            found[process.pid] = process
    ranks = [process for process in found.values() if process.info["ppid"] not in found]
    return sorted(ranks, key=lambda process: process.info["environ"].get("RANK", "0"))


def log_of(directory: Path) -> str:
    return (directory / "runs/tiny/log.txt").read_text()


def steps_of(directory: Path) -> list[int]:
    lines = (directory / "runs/tiny/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "eval/" not in line]
