"""Steps whose loss or gradient norm is far above those of the steps before.

The score is that of OLMo-core's SkipStepOptimizer (6 standard deviations above the mean of the last
128 steps), made robust: the median, and the median absolute deviation from it, which the spikes
among those steps hardly move. What is scored is summed over the ranks, and so the same on all.

Rousseeuw and Croux, "Alternatives to the median absolute deviation", 1993: the factor by which it
estimates the standard deviation of normally distributed numbers.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from harness.errors import counted

WINDOW = 128
"""Steps before that a step is compared with; half as many must be known."""
SIGMAS = 6.0
"""How many standard deviations above their median it is a spike."""
NORMAL = 1.4826
LEAST = 0.01
"""Of the median: a smaller deviation is taken for this, where the steps before hardly differ."""
LAG = 3
"""A bound for step n is that of the steps up to n - LAG: at its beginning, these are known on all
ranks, whether there was a save or an evaluation in between or not."""
SECONDS_BETWEEN_WARNINGS = 600.0
"""Of an engine: noise that is skewed, as of a tiny model, has hundreds of spikes an hour."""


class Spike(NamedTuple):
    """One step of one engine, the same on all ranks; plain values, as checkpoints have it."""

    step: int
    engine: str
    text: str
    """What was found, for the log."""
    spans: Sequence[Any]
    """Where its data is: `data.sampler.Span`."""

    def __str__(self) -> str:
        return f"step {self.step}: engine {self.engine!r}: a spike: {self.text}"


class _Numbers(NamedTuple):
    """Of one step of one engine."""

    step: int
    loss: float
    norm: float


def bound_of(values: Sequence[float]) -> float:
    """The largest value that is not a spike after these; inf if they are too few."""
    return _bound(sorted(values), math.inf)


def _bound(values: Sequence[float], value: float) -> float:
    """`bound_of` sorted values; any other number not below `value` if that is no spike, as of most
    steps: it is then not above the smallest bound that there can be."""
    if len(values) < WINDOW // 2:
        return math.inf
    median = _median(values)
    if value <= (least := median + SIGMAS * (LEAST * abs(median))):
        return least
    deviation = _median(sorted(abs(value - median) for value in values))
    return median + SIGMAS * max(NORMAL * deviation, LEAST * abs(median))


def _median(values: Sequence[float]) -> float:
    """Of sorted values."""
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


class _Window:
    """The last `WINDOW` numbers of a kind, in order of size."""

    def __init__(self) -> None:
        self.ordered: list[float] = []
        self._last: deque[float] = deque()

    def add(self, value: float) -> None:
        """The one that is `WINDOW` steps older is forgotten."""
        if len(self._last) == WINDOW:
            del self.ordered[bisect_left(self.ordered, self._last.popleft())]
        self._last.append(value)
        insort(self.ordered, value)


class Spikes:
    """The losses and norms of the last steps by engine, and the spikes found; part of every
    checkpoint."""

    def __init__(self) -> None:
        self.found: list[Spike] = []
        """Those that nothing has followed yet."""
        self._counts: dict[str, int] = {}
        self._windows: dict[str, deque[_Numbers]] = {}
        self._ordered: dict[str, tuple[_Window, _Window]] = {}
        """Losses and norms of the windows."""

    def add(self, step: int, engine: str, loss: float, norm: float, spans: Sequence[Any]) -> int:
        """Adds the numbers of a step, in the order of the steps. Returns the engine's spikes so
        far. Numbers that are not finite do not count."""
        if engine not in self._windows:
            self._remember(engine, [])
        losses, norms = self._ordered[engine]
        texts = []
        for name, value, before in (("loss", loss, losses), ("gradient norm", norm, norms)):
            if math.isfinite(value) and value > (bound := _bound(before.ordered, value)):
                texts.append(f"{name} {value:.4g}, above {bound:.4g}")
        if texts:
            self._counts[engine] = self._counts.get(engine, 0) + 1
            self.found.append(Spike(step, engine, "; ".join(texts), spans))
        if math.isfinite(loss) and math.isfinite(norm):
            self._windows[engine].append(_Numbers(step, loss, norm))
            losses.add(loss)
            norms.add(norm)
        return self._counts.get(engine, 0)

    def largest_norm(self, step: int, engine: str) -> float:
        """The largest gradient norm of a step to come that is not a spike."""
        window = self._windows.get(engine, ())
        return bound_of([n.norm for n in window if n.step <= step - LAG][-WINDOW:])

    def take(self) -> list[Spike]:
        """The spikes found since the last call."""
        found, self.found = self.found, []
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "found": [tuple(spike) for spike in self.found],
            "counts": dict(self._counts),
            "windows": {name: [tuple(n) for n in w] for name, w in self._windows.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.found = [Spike(*spike) for spike in state.get("found", ())]
        self._counts = dict(state.get("counts", {}))
        self._windows, self._ordered = {}, {}
        for name, numbers in state.get("windows", {}).items():
            self._remember(name, [_Numbers(*n) for n in numbers])

    def _remember(self, engine: str, numbers: Sequence[_Numbers]) -> None:
        self._windows[engine] = deque(numbers, maxlen=WINDOW + LAG)
        self._ordered[engine] = _Window(), _Window()
        for one in numbers:
            for window, value in zip(self._ordered[engine], one[1:], strict=True):
                window.add(value)


class SpikeWarnings:
    """Which spikes are warned of: the first one of an engine, and `SECONDS_BETWEEN_WARNINGS` later
    the next, which tells how many there were in between."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, int]] = {}
        """Of each engine's last warning: when, and the step."""
        self._since: dict[str, int] = {}

    def text(self, spike: Spike, now: float) -> str:
        """What to warn of; empty if the next warning only counts it. `now`: seconds, of a clock
        that never goes back."""
        engine = spike.engine
        then, step = self._last.get(engine, (-math.inf, 0))
        if now < then + SECONDS_BETWEEN_WARNINGS:
            self._since[engine] = self._since.get(engine, 0) + 1
            return ""
        self._last[engine] = now, spike.step
        count = self._since.pop(engine, 0)
        more = f" (and {counted(count, 'more spike')} since step {step})" if count else ""
        return f"{spike}{more}"
