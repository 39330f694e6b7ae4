"""What `harness run` does after each end. The attempts are lists of outcomes, without processes."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import memory_files
from harness.health import supervisor
from harness.health.outcome import FILE, Kind, Outcome
from harness.health.supervisor import Supervisor
from tests.support.jobs import written_config

Supervised = Callable[..., tuple[int, str]]


def end(kind: Kind, code: int, step: int | None = None, *, saved: int = -1, **more: Any) -> Any:
    """How an attempt ends, and which step it has saved."""
    return Outcome(kind, code, step=step, **more), saved


class FakeAttempt:
    """Ends with the next of `ends`, again and again the last; a number is an unreported exit."""

    ends: Sequence[Any]
    commands: list[list[str]]
    run_dir: Path
    began = 0.0

    def __init__(self, command: Sequence[str], directory: Path):
        self.end = self.ends[min(len(self.commands), len(self.ends) - 1)]
        self.commands.append(list(command))

    def wait(self) -> int:
        if isinstance(self.end, int):
            return self.end
        outcome, saved = self.end
        if saved >= 0:
            path = self.run_dir / f"checkpoints/step-{saved:08d}"
            path.mkdir(parents=True, exist_ok=True)
            (path / "manifest.json").write_text("{}")
        return outcome.code

    def outcome(self, run_dir: Path | None) -> Outcome | None:
        return None if isinstance(self.end, int) else self.end[0]

    def signal(self, number: int) -> bool:
        return True


@pytest.fixture
def supervised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Supervised:
    """Runs attempts of the tiny run that end so. Returns the exit code, and what is printed."""
    FakeAttempt.commands, FakeAttempt.run_dir = [], tmp_path / "runs/tiny"
    (tmp_path / "runs/tiny/control").mkdir(parents=True)
    monkeypatch.setattr(supervisor, "Attempt", FakeAttempt)
    command = ["deepspeed", "launch/train.py", "--config", str(written_config(tmp_path))]

    def run(*ends: Any, words: Sequence[str] = (), max_restarts: int = 3) -> tuple[int, str]:
        FakeAttempt.ends = ends
        code = Supervisor([*command, *words], max_restarts, backoff_s=0.0).run()
        return code, capsys.readouterr().err

    return run


def audit(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "runs/tiny/commands.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


MEND = "a restart would fail in the same way"
NO_GAIN = "the last 2 attempts have saved no further step"
MANY = "--max-restarts 3 is reached"
UNREPORTED = (
    "and no rank has reported the end of the run; the last 2 attempts have saved no further"
)


@pytest.mark.parametrize(
    ("ends", "tries", "code", "why"),
    [
        ([end("complete", 0)], 1, 0, ""),
        ([end("quit", 0)], 1, 0, ""),
        ([end("lost_rank", 75, saved=1), end("hang", 75, saved=2), end("complete", 0)], 3, 0, ""),
        ([end("error", 1, saved=1), end("checkpoint", 1), end("complete", 0)], 3, 0, ""),
        ([end("signal", 143, saved=n) for n in range(9)], 4, 143, MANY),
        ([end("config", 2)], 1, 2, MEND),
        ([2], 1, 2, MEND),
        ([end("nonfinite", 1, saved=5)], 1, 1, MEND),
        ([end("gradients", 1, saved=5)], 1, 1, MEND),
        ([end("task", 1, 7, saved=5)], 2, 1, "the same step has failed twice in the task's own"),
        ([end("task", 1, n, saved=n) for n in range(9)], 4, 1, MANY),
        ([end("task", 1, 7, saved=1), end("hang", 75, saved=2)] * 2, 4, 75, MANY),
        ([end("lost_rank", 75, 5)], 2, 75, NO_GAIN),
        ([end("lost_rank", 75, 5, saved=3)], 3, 75, NO_GAIN),
        ([end("oom", 1, 5)], 1, 1, "a restart would run out of memory again, unless health.oom ="),
        # Nothing is reported: the exit code lies.
        ([0], 2, 1, f"the command has ended (exit code 0), {UNREPORTED}"),
        ([137], 2, 137, f"the command has ended (killed by SIGKILL), {UNREPORTED}"),
    ],
)
def test_it_goes_by_what_the_run_reports(
    supervised: Supervised, ends: list[Any], tries: int, code: int, why: str
) -> None:
    found, err = supervised(*ends)
    assert (found, len(FakeAttempt.commands)) == (code, tries), err
    assert why in err and err.count("no restart") == bool(why), err


def test_a_restart_is_recorded(supervised: Supervised, tmp_path: Path) -> None:
    """On the terminal, in log.txt and in the audit, with its reason, each once."""
    lost = {"rank": 1, "host": "a", "reason": "its process has ended\nsee there", "phase": "save"}
    code, err = supervised(end("lost_rank", 75, 9, saved=6, **lost), end("complete", 0))
    why = "lost_rank at step 9 in save on rank 1 on host a: its process has ended; from step 6, in"
    assert code == 0 and err.count(f"harness run: restart 1 of 3: {why} 0 s\n") == 1, err
    log = (tmp_path / "runs/tiny/log.txt").read_text()
    assert log.count("\n") == 1 and f"supervisor WARNING restart 1 of 3: {why} 0 s\n" in log
    (record,) = audit(tmp_path)
    assert record["text"] == "restart 1 of 3" and record["front"] == "supervisor"
    assert (record["step"], record["state"], record["result"]) == (9, "done", f"{why} 0 s")


def test_an_end_without_a_report_becomes_one(supervised: Supervised, tmp_path: Path) -> None:
    """In ended.json, for whoever reads it. Without a run directory there is nothing to write to,
    and what is gained is not known."""
    supervised(0)
    outcome = Outcome.read(tmp_path / "runs/tiny" / FILE)
    assert outcome is not None and outcome.kind == "lost_rank" and "exit code 0" in outcome.reason
    FakeAttempt.commands = []
    assert Supervisor(["job"], 3, 0.0).run() == 1
    assert len(FakeAttempt.commands) == 4


def test_what_is_being_written_or_removed_is_no_gain(
    supervised: Supervised, tmp_path: Path
) -> None:
    for name in ("step-00000007.pruned.tmp", "step-00000008.tmp", "step-00000009-best.tmp"):
        path = tmp_path / "runs/tiny/checkpoints" / name
        path.mkdir(parents=True)
        (path / "manifest.json").touch()
    (tmp_path / "runs/tiny/checkpoints/step-00000005-best").mkdir()
    (tmp_path / "runs/tiny/checkpoints/step-00000005-best/manifest.json").touch()
    code, err = supervised(end("lost_rank", 75, 5, saved=3))
    assert code == 75 and len(FakeAttempt.commands) == 2
    assert "; from step 5, in 0 s\n" in err and NO_GAIN in err


def test_what_is_saved_in_memory_is_a_gain_and_freed_at_the_end(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory_files, "SHARED", tmp_path / "shm")
    FakeAttempt.run_dir = memory = memory_files.memory_directory(tmp_path / "runs/tiny")
    gains = [end("lost_rank", 75, 9, saved=step) for step in (10, 20, 30)]
    code, err = supervised(*gains, end("lost_rank", 75, 9, saved=40))
    assert code == 75 and "--max-restarts 3 is reached" in err
    assert "; from step 30, in 0 s\n" in err
    assert not memory.exists()


def test_another_program_names_its_run_directory_itself(
    supervised: Supervised, tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "runs/tiny")
    FakeAttempt.ends = [end("lost_rank", 75, saved=1, run_dir=run_dir), 0, end("complete", 0)]
    assert Supervisor(["job"], 3, 0.0).run() == 0
    assert [record["text"] for record in audit(tmp_path)] == ["restart 1 of 3", "restart 2 of 3"]


def test_micro_batches_shrink(supervised: Supervised, tmp_path: Path) -> None:
    """Each time by the smallest factor, with as much more accumulation, until nothing is left."""
    settings = ["--data.micro_batch_size=6", "--health.oom=shrink"]
    code, err = supervised(end("oom", 75, 0, phase="start"), words=settings)
    assert code == 75 and "the models alone need too much" in err
    FakeAttempt.commands = []
    code, err = supervised(end("oom", 1, 5), words=settings)
    key = "--engines.net.ds_overrides.gradient_accumulation_steps"
    once = ["--data.micro_batch_size=3", f"{key}=2"]
    twice = [*once, "--data.micro_batch_size=1", f"{key}=6"]
    added = [command[len(FakeAttempt.commands[0]) :] for command in FakeAttempt.commands]
    assert added == [[], once, twice], err
    assert code == 1 and "data.micro_batch_size is 1: it cannot be smaller" in err
    results = [record["result"] for record in audit(tmp_path) if record["text"] == "shrink"]
    assert results == [
        "data.micro_batch_size 6 -> 3, gradient_accumulation_steps of net: 1 -> 2",
        "data.micro_batch_size 3 -> 1, gradient_accumulation_steps of net: 2 -> 6",
    ]


def test_a_signal_while_it_waits_ends_it(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(supervisor, "MOST_SECONDS_OF_BACKOFF", 60.0)
    FakeAttempt.ends = [end("hang", 75)]
    assert Supervisor(["job"], 3, backoff_s=60.0).run() == 75
    assert len(FakeAttempt.commands) == 1


def test_it_waits_longer_as_long_as_nothing_is_gained(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    run_dir = str(tmp_path / "runs/tiny")
    gains = [end("hang", 75, saved=n, run_dir=run_dir) for n in (1, 1, 2, 2, 3)]
    FakeAttempt.ends = [*gains, end("complete", 0)]
    assert Supervisor(["job"], 9, backoff_s=200.0).run() == 0
    waits = [record["result"].rpartition("in ")[2] for record in audit(tmp_path)]
    assert waits == ["200 s", "300 s", "200 s", "300 s", "200 s"]
