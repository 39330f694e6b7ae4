"""A section of benchmarks: a process of its own, with a limit."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a section has ended."""

    how: str
    """"ok", its exit code, or its limit."""
    seconds: float
    output: str
    """The last of what it has printed."""


def run_bounded(command: Sequence[str], limit: float, environment: Mapping[str, str]) -> Ended:
    """Runs a command in the root; at its limit it is killed. What it has started ends with it."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            how = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            how = f"ended at its limit of {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return Ended(how, round(time.monotonic() - started, 1), output.read()[-1000:])
