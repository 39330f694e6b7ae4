"""A rank's watchdog, as the rank sees it: starts the process that watches it, and answers that."""

import json
import logging
import multiprocessing
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness import distributed
from harness.config import Config
from harness.distributed.forks import close_in_forks
from harness.health import phases, stacks
from harness.health.lines import Lines

log = logging.getLogger(__name__)

CODE = "import sys; sys.path.insert(0, sys.argv[1]); from harness.health.guard import main; "
CODE += "main(*sys.argv[2:])"
SECONDS_TO_START = 20.0
SECONDS_TO_STOP = 5.0
SECONDS_TO_REPORT = 10.0
"""What the entry point has to report an error: ranks other than 0 wait for it first."""
DEBUGGERS = ("bdb", "pdb", "pydevd", "_pydevd_bundle", "debugpy", "IPython.terminal.debugger")

_current: "Watchdog | None" = None


class Watchdog:
    """The process that watches this one (guard.py), and a thread that answers it."""

    def __init__(self, config: Config, may_end: bool):
        """`may_end`: it may end this process. Raises OSError if no process can be started."""
        self._is_leader = distributed.is_global_leader()
        self._is_local = distributed.local_world_size() == distributed.world_size()
        settings = {
            "rank": distributed.global_rank(),
            "world": distributed.world_size(),
            "process": os.getpid(),
            "is_local": self._is_local,
            "may_end": may_end,
            "timeout_s": config.run.timeout_s,
            "timeouts": config.health.timeouts.model_dump(),
        }
        assert phases.file is not None
        stacks_file = stacks.answer_in_memory()
        ours, theirs = socket.socketpair()
        files = [theirs.fileno(), phases.file, stacks_file]
        root = str(Path(__file__).parents[2])
        words = [sys.executable, "-S", "-E", "-c", CODE, root, *map(str, files)]
        with theirs:
            self._process = subprocess.Popen(
                [*words, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=files,  # and no other: it must not hold this rank's sockets open
            )
        close_in_forks(ours.fileno())  # its end tells the process that this one has ended
        self._socket = ours
        self.lines = Lines(ours)
        self._is_closing = False
        self._hub: queue.Queue[tuple[int, str] | None] = queue.Queue()
        threading.Thread(target=self._answer, name="watchdog", daemon=True).start()

    def join(self) -> None:
        """Meets the watchdogs of the other ranks, in that of rank 0. Collective."""
        found = None
        if self._is_leader:
            with suppress(queue.Empty):
                found = self._hub.get(timeout=SECONDS_TO_START)
        found = distributed.broadcast(found)
        if found is None:
            log.warning("rank 0's watchdog has not started: a hang of one rank is not noticed")
            return
        port, token = found
        host = "127.0.0.1" if self._is_local else os.environ["MASTER_ADDR"]
        self.lines.send(hub=[host, port], token=token)

    def leave(self, seconds: float) -> None:
        """The run is over: in so many `seconds` the end of the rank's process begins, and is only
        watched."""
        self.lines.send(left=seconds)

    def close(self) -> None:
        """Ends the process."""
        self._is_closing = True
        self.lines.send(bye=True)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.lines.close()

    def _answer(self) -> None:
        while self.lines.is_open:
            for message in self.lines.read():
                if "port" in message:
                    self._hub.put((message["port"], message["token"]))
                elif message.get("ask") == "debugged":
                    self.lines.send(debugged=_is_debugged())
                elif "end" in message:
                    try:  # those that Python would wait for, or end
                        for child in multiprocessing.active_children():
                            child.kill()
                    finally:
                        os._exit(message["end"])
        self._hub.put(None)
        if not self._is_closing:
            log.warning("the watchdog of this rank has ended: a hang of this rank is not noticed")


@contextmanager
def watched(config: Config, may_end: bool) -> Iterator[None]:
    """Watches this rank within the context. `may_end`: a hang ends this process; also after the
    context, where Python waits for threads and child processes."""
    global _current
    try:
        watchdog = Watchdog(config, may_end)
    except OSError as error:
        log.warning("hangs are not noticed: cannot start a watchdog: %s", error)
        watchdog = None
    _current, seconds = watchdog, SECONDS_TO_REPORT
    try:
        yield
        seconds = 0.0
    finally:
        _current = None
        if watchdog is not None:
            watchdog.leave(seconds) if may_end else watchdog.close()


def join() -> None:
    """`Watchdog.join`, once this rank has joined the world. Collective."""
    if _current is not None:
        _current.join()


def fails() -> None:
    """This rank has failed and is about to tell the others, which wait for it until then."""
    if _current is not None:
        _current.lines.send(fails=True)


def write_into(run_dir: Path, is_leader: bool) -> None:
    """Where the watchdog of this process, if it has one, writes the stacks and the outcome.
    `is_leader`: of the ranks with this disk, whose watchdog writes into the log."""
    if _current is not None:
        _current.lines.send(run_dir=str(run_dir.absolute()), logs=is_leader)


def _is_debugged() -> bool:
    """Whether the main thread is in a debugger, at its prompt for example."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(DEBUGGERS):
            return True
        frame = frame.f_back
    return False
