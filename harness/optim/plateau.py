"""A schedule that follows an evaluation: the learning rate falls when a metric stops improving."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from harness.errors import ConfigError, did_you_mean, first_few
from harness.optim.arguments import Steps

log = logging.getLogger(__name__)

Factor = Callable[[int], float]
"""From the number of steps taken so far to the factor of the learning rate."""


def warm(step: int, warmup: int) -> float:
    """Linear warm-up from 0 to 1 over `warmup` steps."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


class Plateau:
    """Warm-up, then 1, multiplied by `factor` whenever `patience` evaluations in a row have not
    improved `metric`, and never below `floor`.

    To improve, it must differ from the best by more than `threshold` of the best; NaN is not an
    improvement. He et al., "Deep Residual Learning for Image Recognition", 2016; the criterion is
    that of torch's ReduceLROnPlateau.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        warmup: Steps = 0,
        metric: str = "eval/loss",
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        floor: float = 0.0,
    ):
        if factor >= 1:
            raise ConfigError(f"scheduler 'plateau': factor = {factor}, expected a number below 1")
        self._warmup, self._metric, self._mode = warmup, metric, mode
        self._factor, self._patience = factor, patience
        self._threshold, self._floor = threshold, floor
        self._value = 1.0
        self._best = math.inf if mode == "min" else -math.inf
        self._not_improved = 0
        self._evaluated_step = -1

    def __call__(self, step: int) -> float:
        return warm(step, self._warmup) * self._value

    def awaits(self, step: int) -> bool:
        """Whether no evaluation at a step of the run has been counted."""
        return step != self._evaluated_step

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Counts the evaluation at a step of the run, once. Returns whether it was counted.

        Raises ConfigError if it has no such metric.
        """
        if self._metric not in metrics:
            hint = did_you_mean(self._metric, metrics)
            raise ConfigError(
                f"scheduler 'plateau': metric = {self._metric!r} is not in the evaluation{hint}, "
                f"which has: {first_few(metrics)}"
            )
        if step == self._evaluated_step:
            return False
        self._evaluated_step = step
        value = metrics[self._metric]
        gain = self._best - value if self._mode == "min" else value - self._best
        is_better = gain > (self._threshold * abs(self._best) if math.isfinite(self._best) else 0)
        self._not_improved = 0 if is_better else self._not_improved + 1
        if is_better:
            self._best = value
        elif self._not_improved >= self._patience:
            self._not_improved = 0
            self._value = max(self._value * self._factor, self._floor)
            log.info(
                "step %d: %s has not improved on %g in %d evaluations: the schedule falls to x%g",
                step,
                self._metric,
                self._best,
                self._patience,
                self._value,
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        """What the evaluations so far have led to."""
        return {
            "metric": self._metric,
            "mode": self._mode,
            "value": self._value,
            "best": self._best,
            "not_improved": self._not_improved,
            "evaluated_step": self._evaluated_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Of another metric only the factor reached is kept; its best value means nothing here.
        """
        self._value = state["value"]
        if (state["metric"], state["mode"]) == (self._metric, self._mode):
            self._best, self._not_improved = state["best"], state["not_improved"]
            self._evaluated_step = state["evaluated_step"]
