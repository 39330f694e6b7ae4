"""What this rank is doing: its step, its phase, and since when.

The loop tells by `enter`, which takes half a microsecond: a few numbers are written into memory
that the rank's watchdog maps as well, so that it sees them even if the interpreter is stuck. What
only this process reads is in lists, which are faster. All is module state, as a process is one
rank.
"""

import mmap
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Literal, get_args

Phase = Literal[
    "start",  # until the first step
    "data",  # waiting for a micro-batch
    "forward",
    "backward",
    "step",  # of the optimizer, and what ends a step
    "save",
    "evaluation",
    "export",
    "commands",
    "upload",  # waiting for the store at the end
    "paused",
    "end",  # after the last step, or an error
]
PHASES: tuple[Phase, ...] = get_args(Phase)

SINCE, PHASE, COUNT, STEP = range(4)
"""Cells: seconds of the monotonic clock, the same for all processes of a node; the number of the
phase; phases entered so far, the same on every rank at the same point; the step."""
LONGEST, TIMES = (4 + number * len(PHASES) for number in range(2))
"""The first cells of as many as there are phases: the longest time in a phase, except for the first
`FIRST`; how often it was left, up to `FIRST`."""
CELLS = 4 + 2 * len(PHASES)
FIRST = 2
"""Times that a phase compiles, allocates or fills caches, and is no measure for later ones."""

_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}


@dataclass(frozen=True)
class Doing:
    """What a rank is doing."""

    phase: Phase
    step: int
    """The step in progress, or between steps the last one."""
    seconds: float
    """For how long."""
    count: int
    """Phases entered so far: ranks in lockstep have equal counts at the same point."""

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


def view_of(descriptor: int) -> "memoryview[float]":
    """The cells, as float64, in a file of that many."""
    return memoryview(mmap.mmap(descriptor, 8 * CELLS)).cast("d")


def _new_memory() -> None:
    """New cells, also in a forked process, whose phases are not its rank's."""
    global file, _cells
    if file is not None:
        os.close(file)
    file = os.memfd_create("harness-phases")
    os.truncate(file, 8 * CELLS)
    _cells = view_of(file)
    begin()


def begin() -> None:
    """A run begins: forgets an earlier one in this process."""
    global _since, _number, _count, _longest, _times, listener
    listener = None
    _since, _number, _count = monotonic(), 0, 0
    _longest, _times = [0.0] * len(PHASES), [0] * len(PHASES)
    _cells[:] = memoryview(array("d", bytes(8 * CELLS)))
    _cells[SINCE] = _since


listener: Callable[[Phase], None] | None = None
"""Called with every phase that this rank enters: the clock of the step in progress."""

file: int | None = None
"""The memory's descriptor, for the watchdog."""
_cells: "memoryview[float]"
_since: float
_number: int
_count: int
_longest: list[float]
_times: list[int]
_new_memory()
os.register_at_fork(after_in_child=_new_memory)


def enter(phase: Phase) -> None:
    """This rank begins a phase. A phase that goes on calls it again, as a sign of life."""
    global _since, _number, _count
    cells, now, before = _cells, monotonic(), _number
    took = now - _since
    if _times[before] < FIRST:
        _times[before] += 1
        cells[TIMES + before] = _times[before]
    elif took > _longest[before]:
        _longest[before] = cells[LONGEST + before] = took
    _since, _number, _count = now, _NUMBERS[phase], _count + 1
    cells[SINCE] = now  # first: who reads in between sees the old phase, just begun
    cells[PHASE] = _number
    cells[COUNT] = _count
    if listener is not None:
        listener(phase)


@contextmanager
def during(phase: Phase) -> Iterator[None]:
    """The phase within the context, and then the one before, unless there is an error: what reports
    the error tells the phase."""
    before = PHASES[_number]
    enter(phase)
    yield
    enter(before)


def beat() -> None:
    """A sign of life of a phase with many parts, such as the batches of an evaluation."""
    enter(PHASES[_number])


def wait_on() -> None:
    """A sign of life of this rank alone, in a wait that the others do not have: the count of signs,
    by which a rank that is behind the others is found, stays."""
    _cells[SINCE] = monotonic()


def at_step(step: int) -> None:
    """The step in progress."""
    _cells[STEP] = step


def now() -> Doing:
    """What this rank is doing; from any thread."""
    return doing(_cells)


def doing(cells: "memoryview[float]") -> Doing:
    """What the rank with these cells is doing."""
    seconds = monotonic() - cells[SINCE]
    return Doing(PHASES[int(cells[PHASE])], int(cells[STEP]), seconds, int(cells[COUNT]))


def read(descriptor: int) -> tuple[int, str]:
    """Step and phase of the rank with the cells in a file."""
    found = doing(view_of(descriptor))
    return found.step, found.phase


def step() -> int:
    """The step in progress, or between steps the last one."""
    return int(_cells[STEP])


def longest(phase: Phase) -> float:
    """The longest time in a phase, except for the first ones."""
    return _longest[_NUMBERS[phase]]
