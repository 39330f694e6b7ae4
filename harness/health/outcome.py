"""How a run has ended, for whatever started it: launchers lose exit codes (torchrun turns all
into 1).

Every rank that ends writes its outcome, on the disk of its node, and the one that tells most stays:
after an error on one rank the others only know that they have lost a rank. Does not import torch.
"""

import json
import logging
import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from harness.errors import (
    RESTART_CODE,
    HarnessError,
    Kind,
    LostRank,
    is_on_all_ranks,
    kind_of,
)
from harness.files import json_write, staging_path
from harness.health import phases

log = logging.getLogger(__name__)

FILE = "ended.json"
"""Its name in the run directory."""
VARIABLE = "HARNESS_OUTCOME"
"""The environment variable with another path that it is written to, also by a run that has no
directory yet."""

_run_dir: Path | None = None  # of the run in this process


@dataclass(frozen=True)
class Outcome:
    """One end of a run, good or bad."""

    kind: Kind
    code: int
    reason: str = ""
    rank: int | None = None
    """The rank that it is about, if there is one."""
    host: str | None = None
    step: int | None = None
    phase: str | None = None
    run_dir: str | None = field(default=None, compare=False)
    """The run directory, once there is one: set when it is written."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def is_over(self) -> bool:
        """Whether the run has ended as was wanted: all steps are taken, or a `quit` ended it."""
        return self.kind in ("complete", "quit")

    @property
    def may_restart(self) -> bool:
        """Whether starting again may go better."""
        return self.kind in ("lost_rank", "hang", "oom", "signal", "checkpoint", "error")

    @property
    def tells(self) -> int:
        """How much it tells: a rank that is lost, or ended by its launcher, is another's doing."""
        if self.kind == "lost_rank":
            return 0 if self.rank is None else 1
        return 1 if self.kind == "signal" else 2

    def write(self, run_dir: Path | None = None) -> None:
        """Writes RUN_DIR/ended.json, and the file that `HARNESS_OUTCOME` names, unless what they
        have tells as much. `run_dir`: None is that of the run in this process, if it has one."""
        run_dir = run_dir or _run_dir
        outcome, paths = self, []
        if run_dir is not None and run_dir.is_dir():
            outcome = replace(self, run_dir=str(run_dir.absolute()))
            paths.append(run_dir / FILE)
        if os.environ.get(VARIABLE):
            paths.append(Path(os.environ[VARIABLE]))
        for path in paths:
            try:
                outcome._write(path)
            except OSError as error:  # the end goes on
                log.error("cannot write how the run has ended: %s", error)

    def _write(self, path: Path) -> None:
        if Outcome.read(path) is None:
            with suppress(FileExistsError):
                _create(json.dumps(asdict(self), indent=2) + "\n", path)
                return
        known = Outcome.read(path)  # of another rank
        if known is None or self.tells > known.tells:
            json_write(asdict(self), path)

    @staticmethod
    def read(path: Path) -> "Outcome | None":
        """The outcome in a file; None if there is no such file, or it holds something else."""
        try:
            return Outcome(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @staticmethod
    def of(error: BaseException) -> "Outcome":
        """The outcome of a run that this error ends, in the step and phase of this rank."""
        kind = kind_of(error)
        code = _code_of(error, kind)
        is_ours = isinstance(error, HarnessError)
        reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
        doing = phases.now()
        if isinstance(error, LostRank):
            place = (error.rank, error.host, error.step or doing.step, error.phase or doing.phase)
            return Outcome(kind, code, reason, *place)
        is_own = kind != "config" and not is_on_all_ranks(error)
        if is_own:
            rank, host = _own_rank(), socket.gethostname()
        else:
            rank, host = error.rank if is_ours else None, None
        return Outcome(kind, code, reason, rank, host, doing.step, doing.phase)


def write_into(run_dir: Path | None) -> None:
    """The outcome of this process's run belongs into that directory, whose lock the run holds."""
    global _run_dir
    _run_dir = run_dir


def forget(run_dir: Path) -> None:
    """Removes an earlier start's outcome from a run directory."""
    (run_dir / FILE).unlink(missing_ok=True)


def forget_of_environment() -> None:
    """Removes an earlier start's outcome that `HARNESS_OUTCOME` names."""
    if os.environ.get(VARIABLE):
        Path(os.environ[VARIABLE]).unlink(missing_ok=True)


def _create(text: str, path: Path) -> None:
    """A new file, complete at once. Raises FileExistsError if another rank was faster."""
    staged = staging_path(path)
    try:
        staged.write_text(text)
        os.link(staged, path)
    except PermissionError:  # a file system without links
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _own_rank() -> int | None:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else None


def _code_of(error: BaseException, kind: Kind) -> int:
    if isinstance(error, HarnessError):
        return error.code
    return {"signal": 128 + signal.SIGINT, "oom": RESTART_CODE}.get(kind, 1)
