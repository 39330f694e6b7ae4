"""`harness.launch`: ranks on this machine, and how they end."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness import Callback, Config, EarlyStopping, Task, local_ranks
from harness.callbacks import CallbackRun
from harness.errors import CheckpointError, ConfigError, HarnessError, LostRank, TaskError
from tests import test_api
from tests.support.helpers import ROOT


def test_ranks_train_together(tmp_path: Path) -> None:
    config = test_api.tables(tmp_path, stage=2)
    result = harness.launch(test_api.build, ranks=2, config=config)
    assert result.metrics["samples"] == 4 * 2 * 4 and result.ended == "complete"


ASKING = """
import importlib, torch

def is_available():
    print("asked for GPUs")
    return False

torch.cuda.device_count = lambda: 1
torch.cuda.is_available = is_available
torch.backends.cuda.is_built = lambda: True
from harness.local_ranks import preloaded
for name in preloaded():
    importlib.import_module(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", [None, "cpu"])
def test_the_parent_of_the_ranks_does_not_ask_for_gpus(accelerator: str | None) -> None:
    """It would be "Cannot re-initialize CUDA in forked subprocess" in every rank."""
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    environment |= {"DS_ACCELERATOR": accelerator} if accelerator else {}
    command = [sys.executable, "-c", ASKING]
    asked = subprocess.check_output(command, env=environment, text=True)
    assert not asked


def test_with_a_torch_for_gpus_nothing_is_imported_for_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert local_ranks.preloaded() == ["harness.launcher.fork_server"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local_ranks.preloaded() == local_ranks.PRELOADED


@pytest.mark.slow
def test_ranks_train_without_anything_imported_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.local_ranks.preloaded", list)
    test_ranks_train_together(tmp_path)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_raised_once(tmp_path: Path) -> None:
    task = {"task": {"path": str(ROOT / "tests/tasks/tiny_task.py"), "args": {"raise": True}}}
    with pytest.raises(TaskError, match="RuntimeError: the task is unwell"):
        harness.launch(ranks=2, config=test_api.tables(tmp_path, stage=2) | task)


def test_a_task_that_cannot_be_sent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.local_ranks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="put it into a file, or pip install cloudpickle"):
        harness.launch(lambda config: test_api.build(), ranks=2, config=test_api.tables(tmp_path))


class Kill(Callback):
    """Kills rank 1 once, when step 10 is saved."""

    def on_step(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
        marker, latest = run.config.run_dir / "killed", run.config.run_dir / "checkpoints/latest"
        saved = latest.exists() and latest.read_text().strip() == "step-00000010"
        if not run.is_leader and saved and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def build_killed(config: Config) -> Task:
    task = test_api.build(config)
    task.callbacks = [EarlyStopping(patience=3, min_delta=1e9), Kill()]
    return task


@pytest.mark.slow
def test_events_and_patience_go_on_after_a_kill(tmp_path: Path) -> None:
    events = [{"command": "lr x0.5", "every": 5}, {"command": "export", "at": 10}]
    config = test_api.tables(tmp_path, stage=2, name="killed", steps=40) | {
        "events": events,
        "trainer": {"save_every": 5, "eval_every": 5},
    }
    with pytest.raises(LostRank, match="rank 1"):
        harness.launch(build_killed, ranks=2, config=config)
    result = harness.launch(build_killed, ranks=2, config=config)
    assert result.ended == "quit" and result.metrics["step"] == 15  # not better than at step 0
    commands = map(json.loads, (tmp_path / "killed/commands.jsonl").open())
    executed = [(each["step"], each["text"]) for each in commands if each["state"] == "done"]
    halved = [(step, "lr x0.5") for step in (5, 10, 15)]
    assert sorted(executed) == sorted([*halved, (10, "export"), (15, "quit")])


def answers_of(*ranks: Callable[[Any], None]) -> list[Any]:
    """What `launch` is answered by processes that are given their pipes."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    with local_ranks._stops() as stops:
        for rank in ranks:
            pipe, theirs = context.Pipe()
            processes.append(context.Process(target=rank, args=(theirs,)))
            processes[-1].start()
            theirs.close()
            pipes.append(pipe)
        try:
            return local_ranks._answers(pipes, processes, stops)
        finally:
            for process in processes:
                process.kill()
                process.join()


def test_a_rank_that_hangs_after_another_has_failed_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_ranks, "GRACE_S", 0.1)
    failing = pickle.dumps(TaskError("unwell"))
    first, second = answers_of(lambda pipe: pipe.send_bytes(failing), lambda _: time.sleep(60))
    assert isinstance(first, TaskError) and isinstance(second, LostRank)
    assert str(second).startswith("rank 1 has not ended 0 s after another one had failed")


def test_a_signal_is_passed_on_to_the_ranks_and_raised_when_they_have_ended() -> None:
    begun = multiprocessing.get_context("fork").Barrier(2)  # Python drops signals as it forks

    def first(pipe: Any) -> None:
        begun.wait()
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    def second(pipe: Any) -> None:
        begun.wait()
        time.sleep(60)

    with pytest.raises(local_ranks._Stopped) as stopped:
        answers_of(first, second)
    assert stopped.value.number is signal.SIGTERM


def test_a_second_signal_does_not_wait_for_ranks_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "SECONDS_OF_ONE_STOP", 0.0)

    def hanging(pipe: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.2)
        os.kill(os.getppid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        time.sleep(60)

    with pytest.raises(local_ranks._Stopped) as stopped:
        answers_of(hanging)
    assert stopped.value.number is signal.SIGTERM


def test_a_rank_that_cannot_save_after_a_signal_is_told_of() -> None:
    failing = pickle.dumps(CheckpointError("no space left"))

    def first(pipe: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.2)
        pipe.send_bytes(failing)

    with pytest.raises(CheckpointError, match="no space left"):
        local_ranks._outcome(answers_of(first))


def test_a_signal_ends_a_rank_that_waits_in_c() -> None:
    """Python's handlers, like that of the process that ranks are forked from, are not called there,
    but between two lines of Python."""
    code = """
import os, signal, time
from harness.launcher import fork_server
if rank := os.fork():
    os.kill(os.getpid(), signal.SIGTERM)  # the parent is unmoved
    time.sleep(0.1)
    os.kill(rank, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))
else:
    fork_server.end_by_signals()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    time.sleep(30)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == (f"{-signal.SIGTERM}\n", 0), done.stderr


def test_ranks_that_a_signal_has_ended_are_not_lost() -> None:
    answers = answers_of(
        lambda _: os.kill(os.getpid(), signal.SIGHUP), lambda _: os._exit(128 + signal.SIGHUP)
    )
    with pytest.raises(HarnessError, match="the ranks were ended by SIGHUP"):
        local_ranks._outcome(answers)


SCRIPT = """
import os, harness
from tests.test_api import build, tables
if __name__ == "__main__":
    environment = dict(os.environ)
    config = tables("runs", stage=2, name="stopped", steps=10**6)
    try:
        harness.launch(build, ranks=2, config=config)
    finally:
        print(dict(os.environ) == environment)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_script_that_is_ended_by_a_signal_has_saved(
    tmp_path: Path, send: Callable[[int, int], None], number: signal.Signals
) -> None:
    """Sent to the script, or to its ranks as well, as a terminal does."""
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as script:
        try:
            harness.command(tmp_path / "runs/stopped", "status", wait_s=200)
            send(script.pid, number)
            output = script.communicate(timeout=60)[0]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == -number
    assert list((tmp_path / "runs/stopped/checkpoints").glob("step-*"))
    if number is signal.SIGINT:  # one, of Python, for a KeyboardInterrupt that nobody catches
        assert output.count("Traceback") == 1 and output.endswith("\nKeyboardInterrupt\n")
        assert "True\nTraceback" in output
    else:
        assert "Traceback" not in output


def test_a_rank_that_starts_ranks_as_it_imports_its_script_says_so() -> None:
    (answer,) = answers_of(lambda _: os._exit(os.EX_USAGE))
    assert isinstance(answer, ConfigError) and "the script calls harness.launch when" in str(answer)


@pytest.mark.slow
def test_a_script_without_a_guard_is_one_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import harness\nharness.launch('task.py', ranks=2, config={})\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stderr.count("Traceback") == 1
    assert "the script calls harness.launch when it is imported" in run.stderr.splitlines()[-1]
