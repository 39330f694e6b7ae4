"""How long a step takes, without waiting for it."""

import time

import torch

from harness import distributed


class StepClock:
    """Runs from its making to `stop`. On a GPU, events measure when the device begins and ends the
    step: the host, which runs ahead, only knows how long it took to enqueue it."""

    def __init__(self) -> None:
        self._began, self._ended = _now(), None

    def stop(self) -> None:
        """Ends the step."""
        self._ended = _now()

    def seconds(self) -> float:
        """The step's duration; on a GPU, once the device has ended it."""
        if isinstance(self._ended, torch.cuda.Event):
            assert isinstance(self._began, torch.cuda.Event)
            return self._began.elapsed_time(self._ended) / 1000
        assert isinstance(self._began, float) and isinstance(self._ended, float)
        return self._ended - self._began


def _now() -> "float | torch.cuda.Event":
    if distributed.device().type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
