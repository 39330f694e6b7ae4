"""The process beside a rank that notices when it hangs, and when it ends without a word.

It is a light one of its own, without torch, so that it outlives a stuck interpreter, a held GIL and
a rank that is stopped. It ends with its rank, whose socket it holds.
"""

import json
import math
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from select import select
from time import monotonic
from typing import Any

from harness.errors import RESTART_CODE
from harness.health import phases, processes, stacks
from harness.health.hub import Hub
from harness.health.lines import Lines, Message
from harness.health.outcome import FILE, VARIABLE, Outcome
from harness.health.verdict import BELOW_TIMEOUT, Report, Verdict, bound_of, told, told_waiting

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_OF_A_GAP = 5.0
"""A look that comes later: this process was stopped itself, with the rank."""
SECONDS_TO_EXIT = 2.0
SECONDS_TO_CONNECT = 10.0
SECONDS_TO_HEAR = 45.0
"""For rank 0's watchdog to ask, once it is told of a rank that is overdue. It may first wait for
the watchdogs of all ranks (`hub.SECONDS_TO_MEET`)."""
SECONDS_TO_TELL = 1.0
"""For a rank that may be in a debugger."""


class Guard:
    """Watches the parent process."""

    def __init__(
        self, rank: Lines, cells: "memoryview[float]", stacks_file: int, settings: Message
    ):
        """`settings`: what `Watchdog` passes."""
        self._rank = rank
        self._cells = cells
        self._stacks_file = stacks_file
        self._settings = settings
        self._number: int = settings["rank"]
        self._process: int = settings["process"]
        self._host = socket.gethostname()
        self._run_dir: Path | None = None
        self._is_leader = False  # of the ranks with the run directory's disk
        self._hub = Hub(settings["world"], settings["is_local"]) if self._number == 0 else None
        self._link: Lines | None = None  # to the hub
        self._activity = processes.Activity(self._process, without=os.getpid())
        self._excused = self._looked = monotonic()
        """Until then the rank had an excuse; the last look."""
        self._is_joined = settings["world"] == 1
        self._to_join: Message | None = None  # where the hub is, until it is reached
        self._give_up = math.inf
        self._asks_since: float | None = None
        """When the hub was first told that the rank is overdue, until it asks."""
        self._left_at: float | None = None  # when the run was over for the rank
        self._long_start = 0.0  # seconds of a start that computes which were told
        self._told_of = -1  # the count of phases of a hang that was told, but did not end the rank
        if self._hub is not None:
            rank.send(port=self._hub.port, token=self._hub.token)

    def watch(self) -> None:
        """Until the rank has ended."""
        while self._rank.is_open:
            sources: list[Any] = [self._rank]
            if self._link is not None:
                sources.append(self._link)
            if self._hub is not None:
                sources += [self._hub.listener, *self._hub.members]
            ready = select(sources, [], [], SECONDS_BETWEEN_LOOKS)[0]
            for source in ready:
                self._read(source)
            if self._rank not in ready and os.getppid() != self._process:
                break  # a process that it has forked keeps its socket open
            if self._hub is not None:
                self._hub.tick()
            if monotonic() - self._looked >= SECONDS_BETWEEN_LOOKS:
                self._look()
        self._mourn()

    def _read(self, source: Any) -> None:
        if source is self._rank:
            for message in self._rank.read():
                self._hear(message)
        elif self._link is not None and source is self._link:
            for message in self._link.read():
                self._obey(message)
            if not self._link.is_open:
                self._link = None
        elif self._hub is not None and source is self._hub.listener:
            self._hub.accept()
        elif self._hub is not None and source in self._hub.members:
            self._hub.read(source)

    def _hear(self, message: Message) -> None:
        """Of the rank."""
        if "fails" in message and self._link is not None:
            self._link.send(fails=True)
        if "left" in message:
            self._left_at = monotonic() + message["left"]
        if "left" in message or "bye" in message:
            self._leave_hub()
        if "bye" in message:
            sys.exit()
        if "run_dir" in message:
            self._run_dir, self._is_leader = Path(message["run_dir"]), message["logs"]
        if "hub" in message:
            self._is_joined, self._to_join = True, message
            self._give_up = monotonic() + SECONDS_TO_CONNECT
            self._connect(message["hub"], message["token"])

    def _leave_hub(self) -> None:
        self._to_join = None
        if self._link is not None:
            self._link.send(bye=True)
            self._link.close()
            self._link = None

    def _connect(self, hub: tuple[str, int], token: str) -> None:
        try:
            connection = socket.create_connection((hub[0], hub[1]), SECONDS_TO_TELL)
        except OSError as error:
            if monotonic() > self._give_up:
                self._say(f"this watchdog cannot reach that of rank 0 at {hub}: {error}")
                self._to_join = None
            return
        self._link, self._to_join = Lines(connection), None
        self._link.send(token=token, report=asdict(self._report()))

    # Looking

    def _look(self) -> None:
        if self._to_join is not None:
            self._connect(self._to_join["hub"], self._to_join["token"])
        now = monotonic()
        is_late = now - self._looked > SECONDS_OF_A_GAP
        self._looked = now
        may_work = self._left_at is not None or phases.doing(self._cells).phase == "start"
        works = self._activity.is_working() if may_work else False
        if is_late or works or processes.is_traced(self._process):
            self._excused = now
        report = self._report()
        if works and self._number == 0:
            self._tell_of_start(report)
        if not report.is_overdue or report.count == self._told_of or not self._is_joined:
            self._asks_since = None
            return
        if self._link is not None:
            self._asks_since = self._asks_since or now
            self._link.send(overdue=True)
        is_heard = self._link is not None and now - (self._asks_since or now) < SECONDS_TO_HEAR
        if not is_heard and not self._is_debugged():
            self._end_alone(report)

    def _tell_of_start(self, report: Report) -> None:
        """A start that computes is no hang, but may be an endless loop: of a long one it is told,
        each time after twice as long."""
        seconds = phases.doing(self._cells).seconds
        if report.phase == "start" and seconds > max(report.bound, 2 * self._long_start):
            self._long_start = seconds
            place = stacks.place_in(stacks.stacks_of(self._process, self._stacks_file))
            self._say(
                f"the start has taken {seconds:.0f} s, and goes on as long as it computes: rank "
                f"{report.rank} on {report.host} is in {place}",
                level="WARNING",
            )

    def _end_alone(self, report: Report) -> None:
        """Where no other rank is asked: there is none, the run is over, or the watchdog of rank 0
        is gone or does not answer, as on a node that is stopped or cut off."""
        self._leave_hub()  # so that this process tells
        python = self._write_stacks()
        place, where = stacks.place_in(python), self._stacks_place()
        has_others = self._settings["world"] > 1 and self._left_at is None
        is_guilty = not (has_others and stacks.waits_for_others(python))
        verdict = Verdict("hang", [report], [])
        self._end(
            {
                "kind": "hang",
                "reason": told(verdict, {report.rank: place}, where)
                if is_guilty
                else told_waiting(report, place, where),
                "rank": report.rank if is_guilty else None,
                "host": report.host if is_guilty else None,
                "step": report.step,
                "phase": report.phase,
            }
        )

    def _report(self, asks_debugger: bool = False) -> Report:
        doing = phases.doing(self._cells)
        if self._left_at is not None:
            doing = replace(doing, phase="end", seconds=max(0.0, monotonic() - self._left_at))
        number = phases.PHASES.index(doing.phase)
        bound = bound_of(
            doing.phase,
            self._cells[phases.LONGEST + number],
            self._cells[phases.TIMES + number],
            self._settings["timeout_s"],
            self._settings["timeouts"],
        )
        return Report(
            rank=self._number,
            host=self._host,
            phase=doing.phase,
            step=doing.step,
            count=doing.count,
            seconds=min(doing.seconds, monotonic() - self._excused),
            bound=min(bound, 1e9),  # JSON has no infinity
            patience=BELOW_TIMEOUT * self._settings["timeout_s"],
            is_stopped=processes.is_stopped(self._process),
            is_debugged=asks_debugger and self._is_debugged(),
        )

    def _is_debugged(self) -> bool:
        """Whether the rank says that its main thread is in a debugger; one that is stuck does not
        answer."""
        if processes.is_stopped(self._process):
            return False
        self._rank.send(ask="debugged")
        for message in self._rank.wait(SECONDS_TO_TELL):
            if "debugged" in message:
                return message["debugged"]
            self._hear(message)
        return False

    # What the hub wants

    def _obey(self, message: Message) -> None:
        assert self._link is not None
        if message.get("ask") == "report":
            self._asks_since = None
            is_overdue = self._report().is_overdue
            self._link.send(report=asdict(self._report(asks_debugger=is_overdue)))
        elif message.get("ask") == "stacks":
            python = self._write_stacks()
            self._link.send(
                rank=self._number,
                place=stacks.place_in(python),
                waits=stacks.waits_for_others(python),
                stacks=self._stacks_place(),
            )
        elif "verdict" in message:
            self._end(message["verdict"])

    def _stacks_place(self) -> str:
        if self._run_dir is None:
            return "The stacks are on each rank's terminal"
        step = phases.doing(self._cells).step
        return f"The stacks are in {self._run_dir}/stacks/step-{step:08d}-rank-*.txt"

    def _write_stacks(self) -> str:
        """Writes the rank's Python stacks, and returns them."""
        report = self._report()
        if report.is_stopped:
            python = "no stacks: the process is stopped (SIGSTOP)\n"
        else:
            python = stacks.stacks_of(self._process, self._stacks_file)
        text = (
            f"rank {report.rank} on {report.host}, process {self._process}: step {report.step}, "
            f"phase {report.phase} for {report.seconds:.0f} s\n\n{python}"
        )
        if self._run_dir is None:
            sys.stderr.write(text)
        else:
            name = f"step-{report.step:08d}-rank-{report.rank}.txt"
            path = self._run_dir / "stacks" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return python

    # Ending

    def _end(self, verdict: dict[str, Any]) -> None:
        """Tells the verdict, and ends the rank if that is this process's business."""
        is_first = self._number == 0 or self._link is None
        self._say(verdict["reason"], on_terminal=is_first, in_log=is_first or self._is_leader)
        if not self._settings["may_end"]:
            self._told_of = phases.doing(self._cells).count
            return
        Outcome(code=RESTART_CODE, **verdict).write(self._run_dir)
        self._write_native_stacks()
        self._rank.send(end=RESTART_CODE)
        end = monotonic() + SECONDS_TO_EXIT
        while self._rank.is_open and monotonic() < end:
            self._rank.wait(end - monotonic())
        if self._rank.is_open:
            os.kill(self._process, signal.SIGKILL)
        sys.exit()

    def _write_native_stacks(self) -> None:
        native = "" if self._run_dir is None else stacks.native_stacks_of(self._process)
        if native and self._run_dir is not None:
            step = phases.doing(self._cells).step
            path = self._run_dir / f"stacks/step-{step:08d}-rank-{self._number}.txt"
            with path.open("a") as file:
                file.write(f"\n{native}")

    def _mourn(self) -> None:
        """The rank has ended without a word: it was killed, has crashed, or called os._exit."""
        if self._left_at is not None:
            return
        doing = phases.doing(self._cells)
        places = [os.environ.get(VARIABLE), self._run_dir and self._run_dir / FILE]
        known = [Outcome.read(Path(place)) for place in places if place]
        if any(ended is not None and ended.tells for ended in known):
            return  # another rank has told why, or this one
        reason = (
            f"rank {self._number} on {self._host}: its process {self._process} has ended without a "
            f"word in step {doing.step}, phase {doing.phase}: it was killed (by the system if "
            "memory ran out: see dmesg), has crashed, or the task has called os._exit"
        )
        outcome = Outcome(
            "lost_rank", RESTART_CODE, reason, self._number, self._host, doing.step, doing.phase
        )
        outcome.write(self._run_dir)
        self._say(reason)

    def _say(
        self, text: str, on_terminal: bool = True, in_log: bool = True, level: str = "ERROR"
    ) -> None:
        """On the terminal and in log.txt, as the log does."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._number} {level} {text}\n"
        if on_terminal:
            sys.stderr.write(line)
            sys.stderr.flush()
        if in_log and self._run_dir is not None and self._run_dir.is_dir():
            with (self._run_dir / "log.txt").open("a") as file:
                file.write(line)


def main(socket_number: str, cells_file: str, stacks_file: str, settings: str) -> None:
    """What `Watchdog` starts; descriptors as numbers, settings as JSON."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group: it ends with its rank
    rank = Lines(socket.socket(fileno=int(socket_number)))
    cells = phases.view_of(int(cells_file))
    Guard(rank, cells, int(stacks_file), json.loads(settings)).watch()
