"""How long a step and its phases take, without waiting for them."""

import time

import torch

from harness import distributed
from harness.health import phases
from harness.health.phases import Phase

_NAMES: dict[Phase, str] = {
    "data": "data_time_s",
    "forward": "forward_time_s",
    "backward": "backward_time_s",
    "step": "optimizer_time_s",
}
"""The metrics of the phases of a step, which take turns until its end."""


class StepClock:
    """Runs from its making to `stop`. On a GPU, events measure when the device begins and ends the
    step and its phases: the host, which runs ahead, only knows how long it took to enqueue them."""

    def __init__(self) -> None:
        self._now = _device_now if distributed.device().type == "cuda" else time.perf_counter
        self._began, self._ended = self._now(), None
        self._phases: list[tuple[Phase, float | torch.cuda.Event]] = [("step", self._began)]
        phases.listener = self._enter

    def _enter(self, phase: Phase) -> None:
        if phase != self._phases[-1][0]:
            self._phases.append((phase, self._now()))

    def stop(self) -> None:
        """Ends the step."""
        self._ended = self._now()
        phases.listener = None

    def seconds(self) -> float:
        """The step's duration; on a GPU, once the device has ended it."""
        assert self._ended is not None
        return _between(self._began, self._ended)

    def by_phase(self) -> dict[str, float]:
        """The part of `seconds` in each phase that the step has had, as `data_time_s` and so on."""
        assert self._ended is not None
        found: dict[str, float] = {}
        ends = [*(began for _, began in self._phases[1:]), self._ended]
        for (phase, began), ended in zip(self._phases, ends, strict=True):
            if name := _NAMES.get(phase):
                found[name] = found.get(name, 0.0) + _between(began, ended)
        return found


def _between(began: "float | torch.cuda.Event", ended: "float | torch.cuda.Event") -> float:
    if isinstance(ended, torch.cuda.Event):
        assert isinstance(began, torch.cuda.Event)
        return began.elapsed_time(ended) / 1000
    assert isinstance(began, float)
    return ended - began


def _device_now() -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
