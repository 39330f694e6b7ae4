"""Traces of torch's profiler over a few steps, one per rank."""

from pathlib import Path

from torch.profiler import profile

from harness import distributed
from harness.control.bus import Bus, Ticket
from harness.errors import CommandError, HarnessError
from harness.files import write_atomically

MAX_STEPS = 1000
"""A trace is kept in memory."""


class Trace:
    """Records the next `steps` steps as Chrome traces, which Perfetto opens."""

    def __init__(self, step: int, steps: int):
        """`step`: the last completed step. Collective. Raises HarnessError on all ranks."""
        self._last = step + steps
        with distributed.raise_on_all_ranks("cannot trace"):
            self._profiler = profile()
            self._profiler.start()

    def is_over(self, step: int) -> bool:
        """Whether all of its steps are completed."""
        return step >= self._last

    def write(self, directory: Path) -> None:
        """Ends the recording, and writes `directory/rank-00000.json` and so on.

        Collective. Raises HarnessError on all ranks.
        """
        with distributed.raise_on_all_ranks(f"cannot write the trace {directory}"):
            self._profiler.stop()
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"rank-{distributed.global_rank():05d}.json"
            export = self._profiler.export_chrome_trace
            write_atomically(path, lambda staged: export(str(staged)))


class Traces:
    """The trace that a command has requested, one at a time, until it is written."""

    def __init__(self, bus: Bus, directory: Path):
        """`bus` answers the command; a trace is written to `directory`/step-...."""
        self._bus = bus
        self._directory = directory
        self._current: tuple[Trace, Ticket] | None = None

    def start(self, step: int, steps: int, ticket: Ticket) -> None:
        """Traces the next `steps` steps after `step`; `ticket` is answered once it is written.

        Collective. Raises CommandError for a second trace, or too long a one.
        """
        if self._current is not None:
            raise CommandError("another trace is being recorded")
        if steps > MAX_STEPS:
            raise CommandError(
                f"at most {MAX_STEPS} steps can be traced: a trace is kept in memory"
            )
        self._current = Trace(step, steps), ticket

    def end(self, step: int, immediately: bool = False) -> None:
        """Writes the trace once its steps have been taken, or `immediately`. Collective."""
        if self._current is None:
            return
        trace, ticket = self._current
        if not (immediately or trace.is_over(step)):
            return
        self._current = None
        directory = self._directory / f"step-{step:08d}"
        try:
            trace.write(directory)
            self._bus.end(ticket, "done", step, f"traced {directory}")
        except HarnessError as error:
            self._bus.end(ticket, "failed", step, str(error))
