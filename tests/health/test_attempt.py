"""The processes of a supervised run: signalled, and none is left. On small jobs without torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.files import locked
from harness.health.attempt import remove_leftovers
from tests.support.helpers import ROOT
from tests.support.jobs import BIN, until

JOB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

here = Path(sys.argv[0]).parent
with (here / "attempts").open("a") as file:
    file.write(".")
number = len((here / "attempts").read_text())

def end(kind, code=1):
    Path(os.environ["HARNESS_OUTCOME"]).write_text(json.dumps(dict(kind=kind, code=code)))
    sys.exit(code)

def child(code, **variables):
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | variables)

rank = '''
import signal, sys, time
from pathlib import Path
def note(number, _):
    with Path("signals").open("a") as file: file.write(signal.Signals(number).name + " ")
    if number != signal.SIGUSR1: sys.exit(128 + number)
for number in (1, 2, 10, 15): signal.signal(number, note)
Path("ready").touch()
time.sleep(60)
'''
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts `harness run` on a job with this body."""

    def popen(body: str, **more: Any) -> subprocess.Popen[str]:
        (tmp_path / "job.py").write_text(JOB + body)
        words = ["run", "--backoff", "0", "--", sys.executable, str(tmp_path / "job.py")]
        return subprocess.Popen(
            [BIN / "harness", *words],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            **more,
        )

    return popen


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it has printed."""
    with process:
        _, err = process.communicate(timeout=60)
    return process.returncode, err


def attempts(directory: Path) -> int:
    return len((directory / "attempts").read_text())


def signals(directory: Path) -> str:
    """What the rank has received."""
    return (directory / "signals").read_text().strip()


@contextmanager
def ready(process: subprocess.Popen[str], directory: Path) -> Iterator[list[psutil.Process]]:
    """All processes below `harness run`, once the rank is ready."""
    try:
        until((directory / "ready").exists, process)
        yield psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_is_passed_on_to_the_ranks_and_ends_the_run(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    """Also a SIGUSR1, which ends nothing; and the launcher, which would die of it, gets none."""
    process = start("end('signal', child(rank, RANK='0').wait())")
    with ready(process, tmp_path) as processes:
        process.send_signal(signal.SIGUSR1)
        until((tmp_path / "signals").exists, process)
        process.send_signal(number)
        code, err = ended(process)
        assert gone(processes)
    assert signals(tmp_path) == f"SIGUSR1 {number.name}"
    assert code == 128 + number and attempts(tmp_path) == 1
    assert f"{number.name} to `harness run`" in err


def test_orphans_save_and_are_gone(start: Start, tmp_path: Path) -> None:
    """Ranks of a dead launcher get SIGTERM; one that is stopped, or in a session of its own, or
    ignores it, is killed. Standard input goes to the job."""
    body = """
if number == 2:
    (here / 'read').write_text(sys.stdin.readline())
    end('complete', 0)
child("import time; time.sleep(99)", RANK="1").send_signal(signal.SIGSTOP)
child("import os, time; os.setsid(); time.sleep(99)", RANK="2")
child(rank, RANK="0")
while not Path("ready").exists(): time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = start(body, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("lr x0.5\n")
    process.stdin.flush()
    with ready(process, tmp_path) as processes:
        code, err = ended(process)
        assert code == 0 and gone(processes), err
    assert "(killed by SIGKILL), and no rank has reported the end of the run" in err
    assert signals(tmp_path) == "SIGTERM" and attempts(tmp_path) == 2
    assert (tmp_path / "read").read_text() == "lr x0.5\n"


def test_nothing_outlives_a_killed_supervisor(start: Start, tmp_path: Path) -> None:
    """The command gets SIGTERM, and ends its ranks, as launchers do."""
    body = """
ours = child(rank, RANK="0")
signal.signal(signal.SIGTERM, lambda *_: ours.terminate())
ours.wait()
"""
    process = start(body)
    with ready(process, tmp_path) as processes:
        process.kill()
        until(lambda: gone(processes))
    process.communicate()
    assert signals(tmp_path) == "SIGTERM"


def test_files_of_killed_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not shared memory that is older, or in use."""
    control = tmp_path / "control"
    control.mkdir()
    monkeypatch.chdir(control)
    own = [tmp_path / ".config.toml.99.tmp", control / ".control.sock.tmp"]
    shared = [Path(f"/dev/shm/torch_{os.getpid()}_{name}") for name in ("old", "used", "free")]
    try:
        shared[0].touch()
        until(lambda: time.time() > shared[0].stat().st_ctime + 0.05)
        since = time.time() - 0.02
        for path in (*own, *shared[1:]):
            path.touch()
        with socket.socket(socket.AF_UNIX) as server, shared[1].open():
            server.bind("control.sock")
            remove_leftovers(tmp_path, since)
        assert [path.exists() for path in shared] == [True, True, False]
        assert not any(path.exists() for path in (*own, control / "control.sock"))
    finally:
        for path in shared:
            path.unlink(missing_ok=True)


def test_a_run_that_has_the_lock_keeps_its_files(tmp_path: Path) -> None:
    script = "from harness.health.attempt import remove_leftovers as r; import sys, pathlib"
    script += "; r(pathlib.Path(sys.argv[1]), 0.0)"
    staged = tmp_path / ".config.toml.99.tmp"
    with locked(tmp_path / "control/lock"):
        staged.touch()
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
        assert staged.exists()


def test_a_missing_program_or_command_is_one_message() -> None:
    for words, message in (
        (["no-such-program"], "No such file or directory: 'no-such-program'"),
        ([], "no command: expected harness run -- deepspeed launch/train.py"),
    ):
        done = subprocess.run(
            [BIN / "harness", "run", "--", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and message in done.stderr, done.stderr
