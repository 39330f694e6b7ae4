"""Ends a run whose evaluations no longer get better."""

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from harness.callbacks.callback import Callback, CallbackRun
from harness.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Ends the run once `patience` evaluations in a row are not better than the best before them.

    Better is lower by more than `min_delta`, or with mode "max" higher. NaN is never better.
    Raises ConfigError if an argument is not valid.
    """

    def __init__(
        self,
        patience: int = 3,
        metric: str = "eval/loss",
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
    ):
        if patience < 1:
            raise ConfigError(f"EarlyStopping: patience = {patience!r}: expected at least 1")
        if mode not in ("min", "max"):
            raise ConfigError(f"EarlyStopping: mode = {mode!r}: expected 'min' or 'max'")
        if not min_delta >= 0:
            raise ConfigError(f"EarlyStopping: min_delta = {min_delta!r}: expected at least 0")
        self.patience, self.metric, self.min_delta = patience, metric, min_delta
        self._sign = 1 if mode == "min" else -1
        self._best = math.nan  # none yet
        self._waited = 0

    def on_start(self, run: CallbackRun) -> None:
        """A run that was stopped stays so when it is started again."""
        if run.is_leader and not run.config.trainer.eval_every:
            log.warning(
                "EarlyStopping: trainer.eval_every is 0: only evaluations by commands can stop the "
                "run"
            )
        self._stop_if_over(run)

    def on_eval(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
        """Raises ConfigError if the evaluation has no such metric."""
        if self.metric not in metrics:
            hint = did_you_mean(self.metric, metrics)
            raise ConfigError(f"EarlyStopping: the evaluation has no {self.metric!r}{hint}")
        value = metrics[self.metric]
        is_first = math.isnan(self._best) and not math.isnan(value)
        if is_first or self._sign * (self._best - value) > self.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        self._stop_if_over(run)

    def _stop_if_over(self, run: CallbackRun) -> None:
        if self._waited >= self.patience:
            last = "last evaluation" if self._waited == 1 else f"last {self._waited} evaluations"
            what = "NaN" if math.isnan(self._best) else f"not better than {self._best:g}"
            run.stop(f"{self.metric} was {what} in the {last}")

    def state_dict(self) -> dict[str, Any]:
        """The best value, and evaluations since."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        best, self._waited = state["best"], state["waited"]
        self._best = math.nan if best is None else best  # in older checkpoints
