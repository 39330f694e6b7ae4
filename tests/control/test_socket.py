"""The socket front and `harness ctl`: many clients, hostile ones, and other users."""

import concurrent.futures
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.control import client
from harness.control.audit import Audit
from harness.control.bus import Bus
from harness.control.client import Client
from harness.control.commands import Query, ShowStatus
from harness.control.grammar import Grammar
from harness.control.signals import Signals
from harness.control.socket import MAX_CLIENTS, SocketFront
from harness.control.wire import MAX_LINE, SOCKET
from harness.files import locked
from harness.health.outcome import Outcome
from tests.support.helpers import ROOT

HARNESS = [str(Path(sys.executable).parent / "harness")]


class Desk(Bus):
    """A bus of one rank whose commands are all done at step 7, a moment after they were queued."""

    def __init__(self, directory: Path):
        self.audit = Audit(directory / "commands.jsonl")
        super().__init__(Grammar(["net"], {}), Signals(), _status, self.audit)
        self._is_working = True
        self._worker = threading.Thread(target=self._work)
        self._worker.start()

    def _work(self) -> None:
        while self._is_working:
            for ticket in self._collect(stop=0, save=0):
                self.end(ticket, "failed" if ticket.text == "eval" else "done", 7, "so it is")
            time.sleep(0.01)

    def stop(self) -> None:
        """Executes no further command."""
        self._is_working = False
        self._worker.join()


def _status(query: Query) -> tuple[str, dict[str, int]]:
    assert query == ShowStatus()
    return "step 7 of 9" + "." * 1000, {"step": 7, "steps": 9}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    front = SocketFront(desk, tmp_path)
    yield desk
    desk.stop()
    desk.close()
    front.close()
    assert not (tmp_path / SOCKET).exists()


def states(run_dir: Path, command: str) -> list[str]:
    """The states of a command that a new client sends."""
    found = Client(run_dir)
    try:
        return [answer.state for answer in found.send(command)]
    finally:
        found.close()


def ctl(run_dir: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HARNESS, "ctl", str(run_dir), *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_command_is_answered_up_to_its_end(tmp_path: Path, desk: Desk) -> None:
    assert states(tmp_path, "save") == ["queued", "done"]
    assert states(tmp_path, "eval") == ["queued", "failed"]
    assert states(tmp_path, "evil") == ["rejected"]
    assert states(tmp_path, "status") == ["done"]
    desk.close()
    assert states(tmp_path, "save") == ["rejected"]


def test_every_command_is_in_the_history(tmp_path: Path, desk: Desk) -> None:
    for command in ("save", "evil", "status", "eval"):
        states(tmp_path, command)
    lines = [json.loads(line) for line in (tmp_path / "commands.jsonl").read_text().splitlines()]
    found = [(line["id"], line["text"], line["state"], line["step"]) for line in lines]
    assert found == [
        (1, "save", "queued", None),
        (1, "save", "done", 7),
        (2, "evil", "rejected", None),
        (4, "eval", "queued", None),
        (4, "eval", "failed", 7),
    ]
    assert {line["front"] for line in lines} == {"socket"}
    assert all(line["user"] and line["time"] > 1.7e9 for line in lines)


def test_our_own_bug_is_logged_and_does_not_end_the_front(
    tmp_path: Path, desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(query: Query) -> str:
        raise KeyError("a bug")

    monkeypatch.setattr(desk, "_answer", broken)
    assert states(tmp_path, "status") == ["rejected"]
    assert "a bug" in caplog.text
    assert states(tmp_path, "save") == ["queued", "done"]


def test_numbers_continue_after_those_of_an_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "commands.jsonl"
    path.write_text('{"id": 12, "text": "save"}\n{"id": 3}\nrubbish\n{"id": 99, "te')
    audit = Audit(path)
    assert audit.last_id == 12
    audit.write({"id": 13})
    audit.close()
    assert path.read_text().splitlines()[-1] == '{"id": 13}'


def test_ctl_prints_the_result_and_returns_its_exit_code(tmp_path: Path, desk: Desk) -> None:
    done = ctl(tmp_path, "save", "as", "x")
    assert (done.returncode, done.stdout, done.stderr) == (0, "step 7: so it is\n", "")
    failed = ctl(tmp_path, "eval")
    assert (failed.returncode, failed.stdout) == (1, "failed: so it is\n")
    rejected = ctl(tmp_path, "evil")
    assert rejected.returncode == 2 and "did you mean 'eval'" in rejected.stdout
    found = ctl(tmp_path, "lr", "x0.5", "--json")
    assert [json.loads(line)["state"] for line in found.stdout.splitlines()] == ["queued", "done"]
    assert ctl(tmp_path, "").returncode == 2
    answered = ctl(tmp_path, stdin="save\n\nevil\nstatus\n")
    assert answered.returncode == 2  # the worst of all
    assert answered.stdout.startswith("step 7: so it is\nrejected: 'evil'")
    assert "step 7 of 9" in answered.stdout
    answered = ctl(tmp_path, "--json", stdin="save\nstatus\n")
    lines = [json.loads(line) for line in answered.stdout.splitlines()]
    assert answered.returncode == 0 and [line["state"] for line in lines] == [
        *("queued", "done"),
        "done",
    ]
    assert lines[0]["values"] is None and lines[-1]["values"] == {"step": 7, "steps": 9}


def test_ctl_waits_for_a_run_that_has_only_just_been_started(tmp_path: Path) -> None:
    run_dir = tmp_path / "later"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one = pool.submit(ctl, run_dir, "save", "--wait", "60")
        typed = pool.submit(ctl, run_dir, "--wait=60", stdin="save\n")
        time.sleep(1)  # most likely they wait already
        run_dir.mkdir()
        desk = Desk(run_dir)
        front = SocketFront(desk, run_dir)
        try:
            for done in (one.result(), typed.result()):
                assert (done.returncode, done.stdout) == (0, "step 7: so it is\n"), done.stderr
        finally:
            desk.stop()
            desk.close()
            front.close()


def test_without_a_run_ctl_explains_why(tmp_path: Path) -> None:
    nowhere = ctl(tmp_path / "x", "save", "--wait", "0.1").stderr
    assert f"{tmp_path}/x: no such run directory" in nowhere and "ctl --wait SECONDS" in nowhere
    missing = ctl(tmp_path, "save")
    assert missing.returncode == 3
    assert f"no run is going on in {tmp_path}: " in missing.stderr
    assert "ctl --wait SECONDS" in missing.stderr
    front = SocketFront(Desk.__new__(Desk), tmp_path)
    front._path = tmp_path / "elsewhere"  # like a killed run, it leaves its socket behind
    front.close()
    dead = ctl(tmp_path, "save")
    assert dead.returncode == 3 and "no answer: the run was killed, or " in dead.stderr
    Outcome("complete", 0, "all 9 steps are taken", step=9).write(tmp_path)
    assert ctl(tmp_path, "save").stderr == (
        f"error: {tmp_path}: the run has ended (complete at step 9)\n"
    )


def test_a_run_that_ends_answers_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(tmp_path)
    front = SocketFront(desk, tmp_path)
    desk.stop()
    with concurrent.futures.ThreadPoolExecutor() as threads:
        waiting = threads.submit(states, tmp_path, "save")
        while not desk._pending:
            time.sleep(0.01)
        with connected(tmp_path) as deaf:  # a client that reads nothing does not delay the end
            deaf.sendall(b"status\n" * 1000)
            assert states(tmp_path, "status") == ["done"]
            desk.close()
            front.close()
        assert waiting.result(timeout=20) == ["queued", "failed"]
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_many_clients_at_once(tmp_path: Path, desk: Desk) -> None:
    with concurrent.futures.ThreadPoolExecutor(50) as threads:
        found = list(threads.map(lambda n: states(tmp_path, f"save as n{n}"), range(200)))
    assert found == [["queued", "done"]] * 200


def test_one_client_sends_many_lines_at_once(tmp_path: Path, desk: Desk) -> None:
    with connected(tmp_path) as raw:
        raw.sendall(b"".join(f"save as n{n}\n".encode() for n in range(300)))
        answers = read_lines(raw, 600)
    done = [answer["text"] for answer in answers if answer["state"] == "done"]
    assert done == [f"save as n{n}" for n in range(300)]


class connected:
    """A raw connection to the socket in a run directory."""

    def __init__(self, run_dir: Path):
        self.raw = socket.socket(socket.AF_UNIX)
        self.raw.settimeout(20)
        self.raw.connect(str(run_dir / SOCKET))

    def __enter__(self) -> socket.socket:
        return self.raw

    def __exit__(self, *_: object) -> None:
        self.raw.close()


def read_lines(raw: socket.socket, number: int) -> list[dict[str, Any]]:
    """That many answers, or all up to the end of the connection."""
    with raw.makefile("r") as file:
        lines = [file.readline() for _ in range(number)]
    return [json.loads(line) for line in lines if line]


def test_a_line_of_10_mb_is_rejected(tmp_path: Path, desk: Desk) -> None:
    with connected(tmp_path) as raw:
        with pytest.raises(ConnectionError):
            raw.sendall(b"x" * 10_000_000)
        (answer,) = read_lines(raw, 1)
    assert answer["state"] == "rejected"
    assert answer["result"] == f"line longer than {MAX_LINE} bytes"
    assert states(tmp_path, "save") == ["queued", "done"]


def test_a_client_that_dies_within_a_line_is_harmless(tmp_path: Path, desk: Desk) -> None:
    with connected(tmp_path) as raw:
        raw.sendall(b"save as first\nsave as se")
    assert states(tmp_path, "save") == ["queued", "done"]
    history = (tmp_path / "commands.jsonl").read_text()
    assert "save as first" in history and "save as se" not in history


def test_a_client_that_reads_nothing_is_disconnected(tmp_path: Path, desk: Desk) -> None:
    with connected(tmp_path) as raw:
        deadline = time.monotonic() + 60
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                raw.sendall(b"status\n" * 100)
        assert states(tmp_path, "save") == ["queued", "done"]


def test_too_many_clients_are_rejected(tmp_path: Path, desk: Desk) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        crowd = [connected(tmp_path) for _ in range(MAX_CLIENTS)]
        for one in crowd:
            one.raw.sendall(b"status\n")
            assert read_lines(one.raw, 1)[0]["state"] == "done"
        assert threads.submit(states, tmp_path, "status").result(20) == ["rejected"]
    for one in crowd:
        one.raw.close()
    deadline = time.monotonic() + 20
    while states(tmp_path, "status") != ["done"]:
        assert time.monotonic() < deadline


def test_only_the_owner_can_reach_the_socket(tmp_path: Path, desk: Desk) -> None:
    assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / SOCKET).parent.stat().st_mode) == 0o700


STRANGER = """
import socket, sys
raw = socket.socket(socket.AF_UNIX)
raw.connect(sys.argv[1])
try:
    raw.sendall(b"save\\n")
except BrokenPipeError:
    pass  # rejected already
sys.stdout.write(raw.makefile().readline())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_rejected(desk: Desk, tmp_path: Path) -> None:
    open_place = Path("/tmp") / f"harness-test-{os.getpid()}"  # tmp_path is closed to others
    open_place.mkdir()
    front = SocketFront(desk, open_place)
    path = open_place / SOCKET

    def stranger() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/usr/bin/env", "python3", "-c", STRANGER, str(path)],
            user=65534,
            group=65534,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    try:
        open_place.chmod(0o755)
        assert "PermissionError" in stranger().stderr
        path.parent.chmod(0o755)
        path.chmod(0o666)  # even then the user is recognised
        answer = json.loads(stranger().stdout)
        assert answer["state"] == "rejected" and "the owner of this run" in answer["result"]
    finally:
        front.close()
        shutil.rmtree(open_place)
    assert not (tmp_path / "commands.jsonl").read_text()


def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    desk = Desk(deep)
    front = SocketFront(desk, deep)
    try:
        assert states(deep, "save") == ["queued", "done"]
    finally:
        desk.stop()
        desk.close()
        front.close()


def test_a_run_directory_has_one_run(tmp_path: Path) -> None:
    lock = f"with locked(Path({str(tmp_path / 'lock')!r})): print('locked', flush=True); input()"
    hold = f"from pathlib import Path; from harness.files import locked\n{lock}"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        with (
            pytest.raises(BlockingIOError, match=f"process {holder.pid} on"),
            locked(tmp_path / "lock"),
        ):
            pass
        holder.kill()
    with locked(tmp_path / "lock"):  # a dead process holds no lock
        pass


def test_the_client_imports_no_torch() -> None:
    """`harness ctl` starts at once."""
    code = f"import {client.__name__}, harness.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
