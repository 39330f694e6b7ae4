"""One attempt of a supervised run: its processes, from the command's start until none is left.

Linux only as to orphans: elsewhere a process whose parent has died is not found any more.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from harness.files import locked
from harness.health.outcome import FILE, VARIABLE, Outcome
from harness.launcher.parent import LAUNCHERS

SECONDS_TO_END = 120.0
"""What ranks have for a last save once their launcher has ended, and the launcher once the run has
reported its end."""
SECONDS_BETWEEN_LOOKS = 0.1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SHARED_MEMORY = ("torch_", "nccl-")
"""How files in /dev/shm of torch's workers and of NCCL begin."""


class Attempt:
    """A command in progress, with all that it has started on this machine.

    This process must start nothing else meanwhile: every process below it belongs to the attempt.
    """

    def __init__(self, command: Sequence[str], directory: Path):
        """Starts the command. `directory`: a new one, for its outcome. Raises OSError."""
        directory.mkdir()
        self._file = directory / FILE
        self._program = Path(command[0]).name
        self.began = time.time()
        _adopt_orphans()
        self._process = subprocess.Popen(
            command,
            env=os.environ | {VARIABLE: str(self._file)},
            preexec_fn=partial(_end_with, os.getpid()),
        )

    def outcome(self, run_dir: Path | None) -> Outcome | None:
        """How the run has ended: what it has reported to this attempt; else, as the ranks may be on
        other machines, in its directory since then."""
        if found := Outcome.read(self._file):
            return found
        found = Outcome.read(run_dir / FILE) if run_dir else None
        return found if found and found.time >= self.began else None

    def wait(self) -> int:
        """Waits until no process is left. Returns the command's exit code, 128 + N of a signal."""
        reported: float | None = None
        while self._process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if reported is None and self._file.exists():
                reported = time.monotonic()
            if reported is not None and time.monotonic() - reported > SECONDS_TO_END:
                break
        self._end()
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> bool:
        """Passes a signal on to the ranks on this machine, of which one suffices the run; without
        any to the command. False if that would die of it, as launchers of a SIGUSR1."""
        ranks = _ranks()
        is_launcher = any(self._program in programs for programs in LAUNCHERS)
        if not ranks and is_launcher and number == signal.SIGUSR1:
            return False
        for process in ranks or [self._process]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.send_signal(number)
        return True

    def _end(self) -> None:
        """Ends what is left: ranks whose launcher has died save first, on SIGTERM."""
        for rank in _ranks():
            with contextlib.suppress(psutil.Error):
                rank.terminate()
        deadline = time.monotonic() + SECONDS_TO_END
        while left := psutil.Process().children(recursive=True):
            is_over = time.monotonic() > deadline
            for process in left:
                with contextlib.suppress(psutil.Error):
                    if is_over or process.status() == psutil.STATUS_STOPPED:  # it cannot save
                        process.kill()
            psutil.wait_procs(left, timeout=SECONDS_BETWEEN_LOOKS)


def _ranks() -> list[psutil.Process]:
    """The ranks below this process: the topmost ones that have a RANK."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RANK" in process.environ():
                found[process.pid] = process
    ranks = []
    for process in found.values():
        with contextlib.suppress(psutil.Error):
            if process.ppid() not in found:
                ranks.append(process)
    return ranks


def _adopt_orphans() -> None:
    """Makes this process the parent of every process below it whose own parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _end_with(parent: int) -> None:
    """In the command, before it is executed: SIGTERM, from the kernel, once `parent` has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)


def remove_leftovers(run_dir: Path | None, since: float) -> None:
    """Removes what killed ranks have left: temporary files and the socket of the run directory,
    unless another run has its lock, and shared memory that was made `since` (seconds since the
    epoch) and that no process uses."""
    if run_dir is not None and (run_dir / "control").is_dir():
        with contextlib.suppress(OSError), locked(run_dir / "control/lock"):
            for path in (*run_dir.glob(".*.tmp"), *run_dir.glob("*/.*.tmp")):
                if path.is_file() or path.is_socket():
                    path.unlink()
            (run_dir / "control/control.sock").unlink(missing_ok=True)
    shared = [Path(entry) for entry in os.scandir("/dev/shm") if _is_ours(entry, since)]
    for path in set(shared) - (_mapped_files() if shared else set()):
        path.unlink(missing_ok=True)


def _is_ours(entry: "os.DirEntry[str]", since: float) -> bool:
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    is_new = status.st_ctime >= since and status.st_uid == os.getuid()
    return is_new and entry.name.startswith(_SHARED_MEMORY)


def _mapped_files() -> set[Path]:
    """The files in /dev/shm that processes use, of those that this user may look into."""
    used: set[Path] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            used |= {
                Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if "/dev/shm/" in line
            }
            used |= {Path(opened.path) for opened in process.open_files()}
    return used
