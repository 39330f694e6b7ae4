"""The current state of the run on rank 0: read from any thread, without other ranks."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from harness.files import truncate
from harness.health import phases
from harness.health.phases import Phase

STEPS_OF_AN_ESTIMATE = 50
ACTIVITIES: dict[Phase, str] = {
    "save": "saving",
    "evaluation": "evaluating",
    "export": "exporting",
    "upload": "uploading",
    "paused": "paused",
}
"""What the status calls the phases between steps."""
HEADLINE = ("loss", "lr", "tokens_per_s", "samples_per_s")
"""Metrics that the status and the progress bar show, for every engine, in this order; samples only
where there are no tokens."""


class Status:
    """Where the run is, what it is doing, and how long it will take.

    The trainer updates it; other threads read it.
    """

    def __init__(self, step: int, steps: int):
        self.step = step
        self.steps = steps
        """The last step of the run."""
        self.activity = "training"
        self._note = ""
        self.on_activity: Callable[[str, int], None] | None = None
        """Called with every new activity and the last step, on the trainer's thread."""
        self._record: Mapping[str, Any] = {}
        self._newest: Mapping[str, Any] = {}
        """Of every metric: an engine with `train_every` has none in most steps."""
        self._ends: deque[tuple[int, float]] = deque([(step, time.monotonic())])

    def restart(self, step: int, steps: int) -> None:
        """Continues after `step`, an earlier one."""
        self.step, self.steps = step, steps
        self._ends = deque([(step, time.monotonic())])

    def stepped(self, step: int) -> None:
        """Records the end of a step."""
        self.step = step
        self._ends.append((step, time.monotonic()))
        if len(self._ends) > STEPS_OF_AN_ESTIMATE:
            self._ends.popleft()

    def note(self, text: str) -> None:
        """Sets what else the line says, empty for nothing."""
        self._note = text

    def show(self, record: Mapping[str, Any]) -> None:
        """Records the newest metrics."""
        self._record, self._newest = record, {**self._newest, **record}

    @contextmanager
    def doing(self, phase: Phase) -> Iterator[None]:
        """The phase within the context, whose duration does not count as training time."""
        previous = self.activity
        self._begin(ACTIVITIES[phase])
        began = time.monotonic()
        try:
            with phases.during(phase):
                yield
        finally:
            self._begin(previous)
            if previous == "training":
                took = time.monotonic() - began
                self._ends = deque((step, ended + took) for step, ended in self._ends)

    def _begin(self, activity: str) -> None:
        self.activity = activity
        if self.on_activity is not None:
            self.on_activity(activity, self.step)

    def line(self) -> str:
        """The state of the run on one line."""
        numbers = "".join(f", {name} {number}" for name, number in headline(self._newest).items())
        idle = time.monotonic() - self._ends[-1][1]
        doing = f"phase {phases.now().phase} for {format_duration(phases.now().seconds)}"
        waiting = f" (last step {format_duration(idle)} ago; {doing})" if idle > 10 else ""
        note = f"; {self._note}" if self._note else ""
        seconds = self._seconds_per_step()
        left = (self.steps - self.step) * seconds if seconds is not None else 0
        left = f", {format_duration(left)} left" if left > 0 else ""
        return f"step {self.step} of {self.steps}{left}, {self.activity}{waiting}{numbers}{note}"

    def values(self) -> dict[str, Any]:
        """The state of the run as numbers: the step, the last one, what it does, in which phase and
        for how long, seconds per step and to the end (None before the first one), and the newest
        record as in metrics.jsonl."""
        phase, seconds = phases.now(), self._seconds_per_step()
        return {
            "step": self.step,
            "steps": self.steps,
            "activity": self.activity,
            "phase": phase.phase,
            "phase_s": phase.seconds,
            "since_last_step_s": time.monotonic() - self._ends[-1][1],
            "seconds_per_step": seconds,
            "seconds_left": None if seconds is None else (self.steps - self.step) * seconds,
            "record": {name: truncate(value) for name, value in self._record.items()},
        }

    def time_left(self, to: int | None = None) -> str:
        """The estimated time to a step (None: the last), from the duration of recent steps."""
        to = self.steps if to is None else to
        if to <= self.step:
            return f"step {to} has already passed: the run is at step {self.step}"
        seconds = self._seconds_per_step()
        if seconds is None:
            return "no step has been completed since the run started"
        remaining = seconds * (to - self.step)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + remaining))
        return f"{format_duration(remaining)} to step {to}, at {at} ({seconds:.3g} s per step)"

    def _seconds_per_step(self) -> float | None:
        """Of the last steps; None before the first one."""
        ends = tuple(self._ends)  # the trainer's thread appends to it
        (first, began), (last, ended) = ends[0], ends[-1]
        return None if last == first else (ended - began) / (last - first)


def headline(record: Mapping[str, Any]) -> dict[str, str]:
    """The most important metrics of a record, formatted."""
    wanted = HEADLINE[:-1] if record.get("tokens_per_s") else (*HEADLINE[:2], HEADLINE[-1])
    return {
        name: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        for last in wanted
        for name, value in record.items()
        if name.rpartition("/")[2] == last
    }


def format_duration(seconds: float) -> str:
    """2 d 3 h, 4 h 5 min, 6 min 7 s, or 8 s."""
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    rest, parts = round(seconds), []
    for unit, size in units:
        count, rest = divmod(rest, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
