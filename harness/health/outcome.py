"""How a run has ended, for whatever started it: launchers lose exit codes (torchrun turns all
into 1)."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from harness.files import json_write

FILE = "ended.json"
"""Its name in the run directory."""
VARIABLE = "HARNESS_OUTCOME"
"""The environment variable with another path that it is written to."""
RESTART_CODE = 75
"""The exit code of an end that a restart may mend (EX_TEMPFAIL of sysexits.h)."""

Kind = Literal[
    "complete",  # all steps are taken
    "quit",  # by a command
    "signal",
    "config",  # ConfigError: a restart fails in the same way
    "task",  # an exception in the task's code
    "checkpoint",  # a save that failed at the end, or a checkpoint that cannot be read
    "gradients",  # GradientError
    "nonfinite",  # too many steps skipped or rolled back
    "lost_rank",
    "hang",
    "oom",
    "error",  # any other
]


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
    run_dir: str | None = None
    """The run directory, once there is one."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def may_restart(self) -> bool:
        """Whether starting again may go better."""
        return self.kind in ("lost_rank", "hang", "oom", "signal", "checkpoint", "error")

    def write(self, run_dir: Path) -> None:
        """Writes RUN_DIR/ended.json, and the file that `HARNESS_OUTCOME` names."""
        paths = [run_dir / FILE] if run_dir.is_dir() else []
        if os.environ.get(VARIABLE):
            paths.append(Path(os.environ[VARIABLE]))
        known = run_dir.absolute() if run_dir.is_dir() else None
        record = asdict(self) | {"run_dir": None if known is None else str(known)}
        for path in paths:
            json_write(record, path)

    @staticmethod
    def read(path: Path) -> "Outcome | None":
        """The outcome in a file; None if there is no such file."""
        try:
            return Outcome(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
