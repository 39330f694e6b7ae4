"""`harness run`: starts a run again after an end that a restart may mend.

It goes by what the run itself has reported (`outcome.py`), as launchers lose exit codes:
`deepspeed` ends with 0 when its own launch.py is killed, torchrun with 1 after every error.
"""

import contextlib
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.config import Config
from harness.config.command_line import parse_args
from harness.errors import ConfigError, HarnessError
from harness.files import JsonLines
from harness.health.attempt import Attempt, remove_leftovers
from harness.health.oom import shrunk
from harness.health.outcome import Outcome
from harness.memory_files import memory_directory, remove_unused_memory

MOST_SECONDS_OF_BACKOFF = 300.0
MOST_WITHOUT_GAIN = 2
"""Attempts in a row that may end without a new checkpoint."""
_COMMITTED = re.compile(r"step-(\d+)(-.*)?(?<!\.tmp)")
"""The name of a checkpoint, not of one that is being written or removed."""
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PASSED_ON = (*STOPPING, signal.SIGUSR1)


class Supervisor:
    """Runs a command until the run is complete, or until starting it again cannot help."""

    def __init__(self, command: Sequence[str], max_restarts: int, backoff_s: float):
        """`backoff_s`: before the first restart; doubled as long as no step is gained."""
        self.command = list(command)
        self.max_restarts = max_restarts
        self.backoff_s = backoff_s
        self.config = config_of(self.command)
        self.run_dir = self.config.run_dir if self.config else None
        self.restarts = 0
        self._signal = 0  # that this process received, and that ends the run
        self._attempt: Attempt | None = None
        self._previous: Outcome | None = None
        self._without_gain = 0

    def run(self) -> int:
        """Returns the exit code: that of the last attempt; 1 if a launcher has lost it."""
        began = time.time()
        with TemporaryDirectory(prefix="harness-run-") as scratch, self._signals_passed_on():
            try:
                while True:
                    outcome = self._try(Path(scratch) / str(self.restarts))
                    why_not = self._why_not(outcome)
                    if why_not is None:
                        why_not = self._wait(outcome)
                    if why_not is not None:
                        return self._end(outcome, why_not)
                    self.restarts += 1
            finally:
                remove_leftovers(self.run_dir, began)
                if self.run_dir is not None:
                    remove_unused_memory(self.run_dir)

    def _try(self, scratch: Path) -> Outcome:
        """An attempt, from its start until none of its processes is left."""
        step = self._saved_step()
        self._attempt = attempt = Attempt(self.command, scratch)
        code = attempt.wait()
        outcome = attempt.outcome(self.run_dir) or _unreported(code)
        if outcome.run_dir is not None:
            self.run_dir = Path(outcome.run_dir)
        elif self.run_dir is not None:
            outcome.write(self.run_dir)
        remove_leftovers(self.run_dir, attempt.began)
        gained = self.run_dir is None or self._saved_step() > step
        self._without_gain = 0 if gained else self._without_gain + 1
        return outcome

    def _why_not(self, outcome: Outcome) -> str | None:
        """Why the run is not started again; empty if it is complete, None if it is."""
        previous, self._previous = self._previous, outcome
        if outcome.is_over:
            return ""
        if self._signal:
            return self._signalled()
        if outcome.kind == "task":
            if previous and (previous.kind, previous.step) == ("task", outcome.step):
                return "the same step has failed twice in the task's own code"
        elif not outcome.may_restart:
            return "a restart would fail in the same way"
        if self.restarts >= self.max_restarts:
            return f"--max-restarts {self.max_restarts} is reached"
        if outcome.kind == "oom":
            return self._why_not_shrunk(outcome)
        if self._without_gain >= MOST_WITHOUT_GAIN:
            return f"the last {MOST_WITHOUT_GAIN} attempts have saved no further step"
        return None

    def _why_not_shrunk(self, outcome: Outcome) -> str | None:
        """Makes the micro-batches of the next attempt smaller; why not, if they cannot be."""
        if self.config is None or self.config.health.oom == "stop":
            return 'a restart would run out of memory again, unless health.oom = "shrink"'
        if outcome.phase == "start":
            return "a restart would run out of memory again: the models alone need too much"
        try:
            words, what = shrunk(self.config)
        except ConfigError as error:
            return str(error)
        self.command += words
        self.config = config_of(self.command)
        self._without_gain = 0
        self._record("shrink", outcome, what)
        return None

    def _wait(self, outcome: Outcome) -> str | None:
        """Waits before a restart. Returns why there is none: a signal has come meanwhile."""
        seconds = min(self.backoff_s * 2**self._without_gain, MOST_SECONDS_OF_BACKOFF)
        saved = self._saved_step()
        where = f"from step {saved}" if saved >= 0 else "from the start"
        number = f"restart {self.restarts + 1} of {self.max_restarts}"
        self._record(number, outcome, f"{_described(outcome)}; {where}, in {seconds:g} s")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._signal:
            time.sleep(0.1)
        return self._signalled() if self._signal else None

    def _signalled(self) -> str:
        return f"{signal.Signals(self._signal).name} to `harness run`"

    def _end(self, outcome: Outcome, why: str) -> int:
        if why:
            self._record("no restart", outcome, f"{_described(outcome)}; {why}")
        if outcome.is_over:
            return outcome.code
        return 128 + self._signal if self._signal and not outcome.code else outcome.code or 1

    def _record(self, what: str, outcome: Outcome, why: str) -> None:
        """Reports what is done on the terminal, in log.txt and in commands.jsonl."""
        now = time.time()
        line = f"{what}: {why}"
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        _print(f"{at} harness run: {line}")
        if self.run_dir is None or not self.run_dir.is_dir():
            return
        record: dict[str, Any] = {"time": now, "front": "supervisor", "text": what}
        record |= {"state": "done", "step": outcome.step, "result": why}
        with contextlib.suppress(OSError):
            with (self.run_dir / "log.txt").open("a") as log:
                log.write(f"{at} supervisor WARNING {line}\n")
            with contextlib.closing(JsonLines(self.run_dir / "commands.jsonl")) as lines:
                lines.write(record, digits=13)

    def _saved_step(self) -> int:
        """The step of the newest checkpoint on this machine or in its memory; -1: there is none."""
        places = (self.run_dir, memory_directory(self.run_dir)) if self.run_dir else ()
        found = (path.glob("checkpoints/step-*/manifest.json") for path in places)
        names = [_COMMITTED.fullmatch(path.parent.name) for paths in found for path in paths]
        return max((int(name[1]) for name in names if name), default=-1)

    @contextlib.contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """Passes signals on to the attempt; after one that ends the run there is no restart."""

        def pass_on(number: int, _: object) -> None:
            if number in STOPPING:
                self._signal = number
            if self._attempt is not None and not self._attempt.signal(number):
                name = signal.Signals(number).name
                _print(f"harness run: {name}: no rank on this machine has begun")

        handled = [n for n in PASSED_ON if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def config_of(command: Sequence[str]) -> Config | None:
    """The config of a command that starts launch/train.py by any launcher. None if it is another
    program, or its config is wrong: that the run itself reports."""
    script = next((n for n, word in enumerate(command) if word.endswith(".py")), len(command))
    words = command[script + 1 :]
    if not any(word.partition("=")[0] == "--config" for word in words):
        return None
    with contextlib.suppress(HarnessError, SystemExit):
        return parse_args(words)
    return None


def _print(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        sys.stderr.write(f"{line}\n")


def _unreported(code: int) -> Outcome:
    """The outcome of an attempt whose ranks have not reported one."""
    if code == ConfigError.code:
        return Outcome("config", code, "the command has ended with exit code 2")
    how = f"killed by {signal.Signals(code - 128).name}" if code > 128 else f"exit code {code}"
    reason = f"the command has ended ({how}), and no rank has reported the end of the run"
    return Outcome("lost_rank", code, reason, host=socket.gethostname())


def _described(outcome: Outcome) -> str:
    """`lost_rank at step 5 on rank 1 of host a: its process has ended`"""
    parts: Mapping[str, object] = {
        "at step": outcome.step,
        "in": outcome.phase,
        "on rank": outcome.rank,
        "on host": outcome.host,
    }
    where = "".join(f" {word} {value}" for word, value in parts.items() if value is not None)
    return f"{outcome.kind}{where}: {outcome.reason.strip().partition(chr(10))[0]}"
