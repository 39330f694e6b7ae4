"""Metrics of each step, averaged over the ranks while the next steps run."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, or_
from typing import Any

import torch

from harness import devices, distributed
from harness.health.stragglers import Times
from harness.metrics.by_rank import ByRank
from harness.metrics.memory import MemoryMeter
from harness.metrics.step_clock import NAMES, StepClock

Stats = Mapping[str, torch.Tensor | float]
"""Metrics of one micro-batch, by name."""


@dataclass
class StepNumbers:
    """Metrics of one step: means and sums over all ranks, and values that are not reduced."""

    local: dict[str, Any]
    """Values that are the same on all ranks, as pushed."""
    means: dict[str, float]
    """Weighted means over the micro-batches of all ranks that reported the metric."""
    samples: int
    """Samples of the step, over all ranks."""
    tokens: int
    """Tokens of the step, over all ranks."""
    times: Sequence[Times] = ()
    """`ByRank.times` of the step."""

    def speed(self, seconds: float) -> dict[str, float]:
        """Samples and tokens per second, of a step of so many seconds."""
        return {"samples_per_s": self.samples / seconds, "tokens_per_s": self.tokens / seconds}


_kind = attrgetter("dtype", "device", "ndim")


@dataclass
class _Sums:
    """Weighted sums of what one rank reports in one step."""

    on_device: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)
    """Float64 vectors, by the names of their elements."""
    numbers: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of values that are on the host."""
    weights: dict[tuple[str, ...], float] = field(default_factory=lambda: defaultdict(float))
    """By the names in a report."""

    def add(self, report: Stats, weight: float) -> None:
        """Adds a report. What is on the host is read at once; nothing waits for the device."""
        self.weights[tuple(report)] += weight
        waits = devices.LIMITS["cpu"].is_asynchronous  # no CPU's; simulated in a test
        numbers, tensors = self.numbers, {}
        for name, value in report.items():
            if not isinstance(value, torch.Tensor):
                numbers[name] += weight * float(value)
            elif waits or not value.is_cpu:
                tensors[name] = value
            else:
                scalar = value.detach().to(torch.float64).mean() if value.ndim else value
                numbers[name] += weight * scalar.item()
        if tensors:
            self._add_tensors(tensors, weight)

    def _add_tensors(self, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
        """Scalars of one kind are added as one vector: an operation on the device costs the same
        for one number as for a hundred."""
        kinds = set(map(_kind, tensors.values()))
        for kind in kinds:
            same = tensors
            if len(kinds) > 1:
                same = {name: value for name, value in tensors.items() if _kind(value) == kind}
            values = list(same.values())
            if kind[2]:
                values = [value.detach().to(torch.float64).mean() for value in values]
            self._add_vector(tuple(same), values, weight)

    @torch.no_grad()
    def _add_vector(
        self, names: tuple[str, ...], values: list[torch.Tensor], weight: float
    ) -> None:
        vector = torch.stack(values).to(torch.float64)
        if weight != 1:
            vector *= weight
        previous = self.on_device.get(names)
        self.on_device[names] = vector if previous is None else previous.add_(vector)

    def copy_to_host(self) -> None:
        """Starts copying the vectors off the device."""
        for names, vector in self.on_device.items():
            self.on_device[names] = vector.to("cpu", non_blocking=True)

    def by_name(self) -> tuple[dict[str, float], dict[str, float]]:
        """The sum and the weight of each metric, once the copies have arrived."""
        sums = dict(self.numbers)
        for names, vector in self.on_device.items():
            for name, value in zip(names, vector.tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value
        weights: dict[str, float] = {}
        for names, weight in self.weights.items():
            for name in names:
                weights[name] = weights.get(name, 0.0) + weight
        return sums, weights


@dataclass
class _Pending:
    """A step in the pipeline."""

    local: dict[str, Any]
    clock: StepClock
    memory: dict[str, int]
    """The newest sample."""
    names: list[str]
    sums: _Sums
    tail: list[int]
    """Samples, tokens, and the number of names that other ranks may not know."""
    copied: torch.cuda.Event | None

    def totals(self) -> tuple[dict[str, float], dict[str, float]]:
        """This rank's sum and weight of each metric. Waits for the copies."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.sums.by_name()

    def own(self) -> dict[str, Any]:
        """`local`, and how long the step and its phases took. Call `totals` first."""
        by_phase = {f"{NAMES[phase]}_s": took for phase, took in self.clock.by_phase.items()}
        return self.local | {"step_time_s": self.clock.seconds()} | by_phase


class StepMeter:
    """A pipeline of two stages: copied off the device, then summed over the ranks.

    It is a part of the step's vector. The metrics of a step are in `take` two exchanges after its
    push, so that nothing waits for the device or for another rank.
    """

    def __init__(self) -> None:
        self._names: list[str] = []  # in the same order on every rank
        self._known: set[str] = set()  # the same names
        self._exchanged: set[str] = set()  # engines whose metrics all ranks know
        self._new_names: dict[str, None] = {}  # unknown to other ranks, perhaps
        self._sums = _Sums()
        self._clock = StepClock()
        self._memory = MemoryMeter()
        self._by_rank = ByRank()
        self._pushed: _Pending | None = None
        self._copying: _Pending | None = None
        self._summing: _Pending | None = None
        self._completed: list[StepNumbers] = []

    def begin(self) -> None:
        """Begins a step, whose duration is reported as `step_time_s`."""
        self._clock = StepClock()

    def add(self, report: Stats, weight: float = 1.0) -> None:
        """Adds the metrics of a micro-batch to the step; with weight 0, their names only."""
        if not self._known.issuperset(report):
            self._new_names |= {name: None for name in report if name not in self._known}
        if weight:
            self._sums.add(report, weight)

    def push(
        self, local: dict[str, Any], reported_by: Sequence[str], samples: int, tokens: int
    ) -> None:
        """Ends a step. To `local` it adds the time, and what `MemoryMeter` samples.

        `reported_by`: the engines that have reported, the same on every rank. When one reports for
        the first time, the ranks exchange the names of its metrics. Other metrics that first appear
        during the run are reported a few steps later, once all ranks know their names.
        """
        if not self._exchanged.issuperset(reported_by):
            self._exchanged.update(reported_by)
            self._exchange_names()
        self._clock.stop()
        local = local | {"time": time.time()} | self._memory.sample()
        sums, self._sums = self._sums, _Sums()
        sums.copy_to_host()
        copied = None
        if distributed.device().type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        tail = [samples, tokens, len(self._new_names)]
        kept = self._clock, self._memory.last
        self._pushed = _Pending(local, *kept, self._names, sums, tail, copied)

    def take(self) -> list[StepNumbers]:
        """The steps completed since the last call."""
        completed, self._completed = self._completed, []
        return completed

    def take_own(self) -> list[StepNumbers]:
        """The steps not yet completed, with the numbers of this rank alone: the others are gone."""
        own = []
        for pending in filter(None, (self._summing, self._copying, self._pushed)):
            sums, weights = pending.totals()
            means = {name: sums[name] / weight for name, weight in weights.items() if weight}
            samples, tokens, _ = pending.tail
            own.append(StepNumbers(pending.own(), means, samples, tokens))
        return own

    def contribute(self) -> Sequence[float]:
        """Sums by name, weights by name, samples, tokens, number of new names, `ByRank.tell`."""
        self._summing, self._copying, self._pushed = self._copying, self._pushed, None
        if self._summing is None:
            return ()
        sums, weights = self._summing.totals()
        names = self._summing.names
        return [
            *(sums.get(name, 0.0) for name in names),
            *(weights.get(name, 0.0) for name in names),
            *self._summing.tail,
            *self._by_rank.tell(self._summing.clock, self._summing.memory),
        ]

    def receive(self, sums: Sequence[float]) -> None:
        """Completes a step."""
        if (pending := self._summing) is None:
            return
        self._summing = None
        size = len(pending.names)
        pairs = zip(pending.names, sums[:size], sums[size : 2 * size], strict=True)
        means = {name: total / weight for name, total, weight in pairs if weight}
        samples, tokens, new_names = map(int, sums[2 * size : 2 * size + 3])
        local = pending.own() | self._by_rank.hear(sums[2 * size + 3 :])
        if new_names:
            self._exchange_names()
        times = self._by_rank.times
        self._completed.append(StepNumbers(local, means, samples, tokens, times))

    def _exchange_names(self) -> None:
        new = distributed.all_reduce(self._new_names, or_)
        self._names = list(dict.fromkeys([*self._names, *new]))
        self._known = set(self._names)
        self._new_names = {}
