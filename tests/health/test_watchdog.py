"""Ranks that hang in every way, each with its real watchdog; without the world, so that it is fast.

All jobs of this file run at the same time.
"""

import ctypes
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from pytest import TempPathFactory

from harness import distributed
from harness.health import outcome, phases, watchdog
from harness.health.outcome import Outcome
from harness.health.phases import Phase
from harness.logs import configure_logging
from tests.support.helpers import tiny_config

BOUND_S = 1.5
LONGER_S = 4.0
FAULTY_STEP = 3  # the first two may take as long as run.timeout_s
fork = multiprocessing.get_context("fork")


def sleep() -> None:
    time.sleep(60)


def pause_longer() -> None:
    time.sleep(LONGER_S)


def sleep_until_told() -> None:
    log = Path(os.environ["HARNESS_OUTCOME"]).with_name("log.txt")
    end = time.monotonic() + 30
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)  # the other rank's stacks


def hold_the_gil() -> None:
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):  # a deadlock
        library.pthread_mutex_lock(mutex)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def exit_silently() -> None:
    os._exit(9)


def second_signal() -> None:
    Outcome("signal", 143, "SIGTERM again: exiting immediately").write()
    os._exit(143)


def work() -> None:
    end = time.monotonic() + LONGER_S
    while time.monotonic() < end:
        sum(range(10000))


def at_a_prompt() -> None:
    """In a frame of pdb's."""
    code = compile("time.sleep(seconds)", "pdb.py", "exec")
    exec(code, {"__name__": "pdb", "time": time, "seconds": LONGER_S})


def all_reduce(seconds: float) -> None:
    """Waits as in a collective of torch's."""
    file = "/site-packages/torch/distributed/distributed_c10d.py"
    code = compile("time.sleep(seconds)", file, "exec")
    exec(code, {"time": time, "seconds": seconds})


def work_while_others_wait() -> None:
    work() if os.environ["RANK"] == "1" else all_reduce(LONGER_S)


def leave_a_process() -> None:
    child = fork.Process(target=time.sleep, args=(60,))
    child.start()
    Path(os.environ["HARNESS_OUTCOME"]).with_name("child").write_text(str(child.pid))
    sleep()


def fail_slowly() -> None:
    watchdog.fails()
    time.sleep(LONGER_S)


def lose_the_watchdog_of_rank_0() -> None:
    if os.environ["RANK"] == "1":
        all_reduce(60)
    assert watchdog._current is not None
    watchdog._current._process.kill()
    time.sleep(LONGER_S)


def stop_the_watchdog_of_rank_0() -> None:
    if os.environ["RANK"] == "1":
        all_reduce(80)
    assert watchdog._current is not None
    os.kill(watchdog._current._process.pid, signal.SIGSTOP)
    time.sleep(55)
    watchdog._current._process.kill()


@dataclass
class Job:
    """Two ranks, the second of which misbehaves in a phase of a step."""

    name: str
    act: Callable[[], None]
    phase: Phase = "forward"
    faulty: tuple[int, ...] = (1,)
    may_end: bool = True
    fails: bool = False
    """Whether the run ends by an error."""
    waits_s: float = 60.0
    """How long the other rank waits for it."""
    directory: Path = Path()
    ranks: list[BaseProcess] = field(default_factory=list)

    def run(self, rank: int) -> None:
        """In the process of a rank."""
        os.dup2(os.open(self.directory / f"err{rank}", os.O_WRONLY | os.O_CREAT), 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ["HARNESS_OUTCOME"] = str(self.directory / "outcome.json")
        sys.stderr = os.fdopen(2, "w", buffering=1)
        configure_logging()
        distributed.broadcast = self.share  # type: ignore[assignment]
        timeouts = dict.fromkeys(("start", "data", "forward", "backward", "end"), BOUND_S)
        config = tiny_config(self.directory, health={"timeouts": timeouts}, run={"timeout_s": 90})
        with suppress(ZeroDivisionError), watchdog.watched(config, self.may_end):
            watchdog.join()
            outcome.write_into(self.directory)
            watchdog.write_into(self.directory, rank == 0)
            if self.phase == "start":
                self.act()
                return
            for step in range(1, 5):
                phases.at_step(step)
                for phase in ("data", "forward", "backward", "save"):
                    if phase in ("data", "forward", "backward") or phase == self.phase:
                        phases.enter(phase)
                    if step == FAULTY_STEP and phase == self.phase:
                        self.act() if rank in self.faulty else self.wait()
            if self.fails:
                raise ZeroDivisionError
        if self.phase == "end" and rank in self.faulty:
            self.act()

    def wait(self) -> None:
        phases.enter("backward" if self.phase != "save" else "step")
        time.sleep(self.waits_s) if self.may_end else sleep_until_told()

    def share(self, found: Any) -> Any:
        """Rank 0's value on every rank."""
        path = self.directory / "shared.json"
        if os.environ["RANK"] == "0":
            path.with_suffix(".tmp").write_text(json.dumps(found))
            path.with_suffix(".tmp").rename(path)
        while not path.exists():
            time.sleep(0.02)
        return json.loads(path.read_text())

    def codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]

    def ended(self) -> Outcome | None:
        found = [Outcome.read(self.directory / name) for name in ("ended.json", "outcome.json")]
        told = [ended and replace(ended, time=0) for ended in found]  # by whoever was first
        assert told[0] == told[1]
        return found[0]

    def log(self) -> str:
        path = self.directory / "log.txt"
        return path.read_text() if path.exists() else ""

    def terminal(self) -> str:
        return "".join((self.directory / f"err{rank}").read_text() for rank in (0, 1))

    def stacks(self, rank: int) -> str:
        return (self.directory / f"stacks/step-{FAULTY_STEP:08d}-rank-{rank}.txt").read_text()


JOBS = [
    Job("sleep", sleep),
    Job("gil", hold_the_gil),
    Job("stop", stop),
    Job("all", sleep, "data", faulty=(0, 1)),
    Job("exit", exit_silently),
    Job("signal", second_signal, faulty=(0, 1)),
    Job("start", sleep, "start", faulty=(0, 1)),
    Job("reported", sleep_until_told, may_end=False),
    Job("paused", pause_longer, "paused", waits_s=0),
    Job("slow save", pause_longer, "save", waits_s=LONGER_S),
    Job("debugger", at_a_prompt, waits_s=LONGER_S),
    Job("compiler", work, "start", faulty=(0, 1)),
    Job("builder", work_while_others_wait, "start", faulty=(0, 1)),
    Job("alone", lose_the_watchdog_of_rank_0, faulty=(0, 1)),
    Job("left", leave_a_process, "end"),
    Job("reports", pause_longer, "end", fails=True),
    Job("fails", fail_slowly, waits_s=LONGER_S),
]


@contextmanager
def ended(jobs: Sequence[Job], directories: TempPathFactory, seconds: float) -> Iterator[None]:
    """Within the context all of them have ended, within so many seconds or not."""
    with ExitStack() as stack:
        for job in jobs:
            job.directory = directories.mktemp(job.name.replace(" ", "-"))
            job.ranks = [fork.Process(target=job.run, args=(rank,)) for rank in (0, 1)]
            for rank in job.ranks:
                rank.start()
                stack.callback(rank.kill)
        for job in jobs:
            for rank in job.ranks:
                rank.join(seconds)
        yield


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: TempPathFactory) -> Iterator[dict[str, Job]]:
    with ended(JOBS, tmp_path_factory, 40):
        yield {job.name: job for job in JOBS}


def test_a_rank_that_hangs_ends_the_run_and_is_named(jobs: dict[str, Job]) -> None:
    job, ended = jobs["sleep"], jobs["sleep"].ended()
    assert job.codes() == [75, 75]
    assert ended is not None and (ended.kind, ended.code, ended.rank) == ("hang", 75, 1)
    assert (ended.step, ended.phase, ended.host) == (3, "forward", os.uname().nodename)
    assert re.search(r"no sign of life for \d+ s in phase forward of step 3", job.log())
    assert "in sleep (test_watchdog.py:" in job.log()
    assert "rank 0 waits in phase backward of step 3, in wait (test_watchdog.py:" in job.log()
    assert f"The stacks are in {job.directory}/stacks/step-00000003-rank-*.txt" in job.log()
    assert job.terminal().count("the run hangs: ") == job.log().count("the run hangs: ") == 1
    assert "in sleep\n" in job.stacks(1) and "in wait\n" in job.stacks(0)
    assert job.stacks(1).startswith(f"rank 1 on {ended.host}, process {job.ranks[1].pid}: step 3")


def test_a_rank_that_holds_the_interpreters_lock(jobs: dict[str, Job]) -> None:
    """It cannot exit by itself, but its stack is there."""
    job, ended = jobs["gil"], jobs["gil"].ended()
    assert job.codes() == [75, -signal.SIGKILL]
    assert ended is not None and (ended.kind, ended.rank, ended.phase) == ("hang", 1, "forward")
    assert "in hold_the_gil\n" in job.stacks(1)


def test_a_stopped_rank(jobs: dict[str, Job]) -> None:
    job, ended = jobs["stop"], jobs["stop"].ended()
    assert job.codes() == [75, -signal.SIGKILL]
    assert ended is not None and (ended.kind, ended.rank) == ("hang", 1)
    assert "in phase forward of step 3, stopped (SIGSTOP)" in job.log()
    assert "the process is stopped" in job.stacks(1) and "in wait\n" in job.stacks(0)


def test_ranks_that_all_hang(jobs: dict[str, Job]) -> None:
    job, ended = jobs["all"], jobs["all"].ended()
    assert job.codes() == [75, 75]
    assert ended is not None and (ended.kind, ended.rank, ended.phase) == ("hang", None, "data")
    assert re.search(r"the run hangs: ranks 0, 1 on \S+: no sign of life", job.log())


def test_a_rank_that_ends_without_a_word(jobs: dict[str, Job]) -> None:
    """Its watchdog tells for it, at once."""
    job, ended = jobs["exit"], jobs["exit"].ended()
    assert job.codes() == [75, 9]
    assert ended is not None and (ended.kind, ended.code, ended.rank) == ("lost_rank", 75, 1)
    assert (ended.step, ended.phase) == (3, "forward")
    assert f"its process {job.ranks[1].pid} has ended without a word in step 3" in job.log()
    assert "os._exit" in job.terminal()


def test_a_rank_that_has_told_why_it_ends(jobs: dict[str, Job]) -> None:
    job, ended = jobs["signal"], jobs["signal"].ended()
    assert job.codes() == [143, 143]
    assert ended is not None and ended.kind == "signal"
    assert job.log() == job.terminal() == ""


def test_a_start_that_hangs(jobs: dict[str, Job]) -> None:
    """As by a lock of a compiler that was killed."""
    job, ended = jobs["start"], jobs["start"].ended()
    assert job.codes() == [75, 75]
    assert ended is not None and (ended.kind, ended.step, ended.phase) == ("hang", 0, "start")


def test_a_hang_in_somebody_elses_process_is_only_reported(jobs: dict[str, Job]) -> None:
    job = jobs["reported"]
    assert job.codes() == [0, 0]
    assert job.ended() is None and "in sleep_until_told\n" in job.stacks(1)
    assert job.log().count("the run hangs: rank 1 ") == 1


def test_a_process_that_does_not_end_after_its_run(jobs: dict[str, Job]) -> None:
    """As it waits for a thread of the task's."""
    job, ended = jobs["left"], jobs["left"].ended()
    assert job.codes() == [0, 75]
    assert ended is not None and (ended.kind, ended.rank, ended.phase) == ("hang", 1, "end")
    assert "no sign of life for 2 s in phase end of step 4, in sleep (test_watchdog" in job.log()
    assert not Path(f"/proc/{(job.directory / 'child').read_text()}").exists()


def test_a_rank_that_waits_is_not_blamed_where_no_other_can_be_asked(jobs: dict[str, Job]) -> None:
    job, ended = jobs["alone"], jobs["alone"].ended()
    assert job.codes() == [0, 75]
    assert ended is not None and (ended.kind, ended.rank, ended.step) == ("hang", None, 3)
    assert "the watchdog of rank 0 does not answer" in job.log()
    assert "the watchdog of this rank has ended: a hang of this rank is" in job.terminal()


@pytest.mark.parametrize(
    "name", ["paused", "slow save", "debugger", "compiler", "builder", "fails", "reports"]
)
def test_what_is_no_hang(jobs: dict[str, Job], name: str) -> None:
    """A pause; a rank that others wait for, in a phase that may take longer; a debugger's prompt; a
    start that computes, also if others wait for it; a rank that is about to tell why it fails, or
    does so at its end."""
    job = jobs[name]
    assert job.codes() == [0, 0] and job.ended() is None
    told = [line for line in job.log().splitlines() if "WARNING the start has taken" not in line]
    assert told == [] and job.terminal() == job.log()


def test_a_long_start_that_computes_is_told(jobs: dict[str, Job]) -> None:
    log = jobs["compiler"].log()
    assert re.search(r"rank 0 WARNING the start has taken \d s, .* is in work \(test_wat", log)


@pytest.mark.slow
def test_a_rank_ends_where_the_watchdog_of_rank_0_is_stopped(
    tmp_path_factory: TempPathFactory,
) -> None:
    """As with its node."""
    job = Job("stopped", stop_the_watchdog_of_rank_0, faulty=(0, 1))
    with ended([job], tmp_path_factory, 70):
        assert job.codes() == [0, 75]
        assert "the watchdog of rank 0 does not answer" in job.log()
        assert "rank 1 ERROR the run hangs: rank 1 on " in job.terminal()


def test_no_watchdog_outlives_its_rank(jobs: dict[str, Job]) -> None:
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            environ = place.read_bytes()
        except OSError:
            continue
        ours = [job.name for job in jobs.values() if str(job.directory).encode() in environ]
        found += [(place.parent.name, name) for name in ours]
    assert found == []
