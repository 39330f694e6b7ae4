"""What rank 0 can say of the run at any moment, from any thread, without asking another rank."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

STEPS_OF_AN_ESTIMATE = 50


class Status:
    """Where the run is, what it is doing, and how long it will take.

    The trainer writes it, and other threads read it.
    """

    def __init__(self, step: int, steps: int):
        self.step = step
        self.steps = steps
        """The step that the run ends at."""
        self.activity = "training"
        self._record: Mapping[str, Any] = {}
        self._ends: deque[tuple[int, float]] = deque([(step, time.monotonic())])

    def stepped(self, step: int) -> None:
        """Notes the end of a step."""
        self.step = step
        self._ends.append((step, time.monotonic()))
        if len(self._ends) > STEPS_OF_AN_ESTIMATE:
            self._ends.popleft()

    def show(self, record: Mapping[str, Any]) -> None:
        """Takes the newest record of the metrics."""
        self._record = record

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Says what the run does besides training, while it does."""
        before, self.activity = self.activity, activity
        began = time.monotonic()
        try:
            yield
        finally:
            self.activity = before
            if before == "training":
                took = time.monotonic() - began  # which was no time of a step
                self._ends = deque((step, ended + took) for step, ended in self._ends)

    def line(self) -> str:
        """The run on one line."""
        numbers = "".join(
            f", {name} {value:.4g}"
            for name, value in self._record.items()
            if name.rpartition("/")[2] in ("loss", "lr", "tokens_per_s")
        )
        quiet = time.monotonic() - self._ends[-1][1]
        waiting = f" (last step {duration(quiet)} ago)" if quiet > 10 else ""
        return f"step {self.step} of {self.steps}, {self.activity}{waiting}{numbers}"

    def time_left(self, to: int | None = None) -> str:
        """How long the run takes to a step (None: to its end), as the last steps went."""
        to = self.steps if to is None else to
        if to <= self.step:
            return f"step {to} is behind: the run is at step {self.step}"
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        if last == first:
            return "no step has ended yet since the run was started"
        seconds = (ended - began) / (last - first)
        left = seconds * (to - self.step)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + left))
        return f"{duration(left)} to step {to}, at {at} ({seconds:.3g} s a step)"


def duration(seconds: float) -> str:
    """2 d 3 h, 4 h 5 min, 6 min 7 s, or 8 s."""
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    rest, parts = round(seconds), []
    for unit, size in units:
        count, rest = divmod(rest, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
