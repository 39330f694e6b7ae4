"""How long a step and its phases take, without waiting for them."""

import time
from collections import defaultdict
from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch

from harness import distributed, waiting
from harness.health import phases
from harness.health.phases import Phase

NAMES: dict[Phase, str] = {
    "data": "data_time",
    "forward": "forward_time",
    "backward": "backward_time",
    "step": "optimizer_time",
}
"""What the times of a step's phases are called, which take turns until its end."""


class StepClock:
    """Runs from its making to `stop`. On a GPU, events measure when the device begins and ends the
    step and its phases: the host, which runs ahead, only knows how long it took to enqueue them."""

    def __init__(self) -> None:
        self._is_device = distributed.device().type == "cuda"
        self._now = _device_now if self._is_device else time.perf_counter
        self._ends: list[tuple[Phase, Any]] = []  # what has ended, and when
        self._phase: Phase = "step"
        self._waited, self._collectives = waiting.seconds, waiting.collectives
        self._in_collectives: dict[Phase, float] = {}  # seconds on the host
        phases.listener = self._enter
        self._began = self._now()

    def _enter(self, phase: Phase) -> None:
        if phase == (ended := self._phase):
            return
        self._ends.append((ended, self._now()))
        if waiting.collectives != self._collectives:
            waited = waiting.seconds - self._waited
            self._in_collectives[ended] = self._in_collectives.get(ended, 0.0) + waited
            self._waited, self._collectives = waiting.seconds, waiting.collectives
        self._phase = phase

    def stop(self) -> None:
        """Ends the step."""
        self._enter("end")
        phases.listener = None

    def seconds(self) -> float:
        """The step's duration; on a GPU, once the device has ended it."""
        return self._between(self._began, self._ends[-1][1])

    @cached_property
    def by_phase(self) -> dict[Phase, float]:
        """The part of `seconds` in each phase that the step has had."""
        found: dict[Phase, float] = defaultdict(float)
        began = self._began
        for phase, ended in self._ends:
            found[phase] += self._between(began, ended)
            began = ended
        return {phase: took for phase, took in found.items() if phase in NAMES}

    def alone(self) -> list[float]:
        """The seconds in each of the phases of `NAMES`, without those in which this rank has waited
        for others; of the phases of `waits_unseen` with them."""
        waited = {} if self._is_device else self._in_collectives
        return [self.by_phase.get(phase, 0.0) - waited.get(phase, 0.0) for phase in NAMES]

    def waits_unseen(self) -> Collection[Phase]:
        """The phases with collectives in which a GPU waits, and not the host."""
        return self._in_collectives.keys() if self._is_device else ()

    def _between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self._is_device else ended - began


def _device_now() -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
