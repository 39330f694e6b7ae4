"""The learning rate and the clipping of an engine, as changed by live commands."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from harness.config.engine_sections import EngineConfig
from harness.errors import CommandError
from harness.optim.schedules import build_factor
from harness.optim.zero_compatibility import check_clipping
from harness.zero import engine_state

log = logging.getLogger(__name__)


class Overrides:
    """Live changes of a trained engine; part of every checkpoint.

    The learning rate of a step is the scheduled or a held one, times a factor.
    """

    def __init__(self, name: str, ds: Any, config: EngineConfig, base_lrs: Sequence[float]):
        """`ds`: the DeepSpeed engine. `base_lrs`: the configured rate of every parameter group."""
        self._name = name
        self._ds = ds
        self._config = config
        self._base_lrs = list(base_lrs)
        self._held_lr: float | None = None
        self._lr_factor = 1.0
        self._clip: float | None = None
        self._configured_clip: float = ds.gradient_clipping()
        self._schedule = repr((config.optimizer, config.scheduler))

    def set_lr(self, lr: float) -> None:
        """Holds the learning rate at `lr` from the next step on, regardless of the schedule.

        Other parameter groups keep their ratio to the first.
        """
        self._held_lr, self._lr_factor = lr, 1.0
        self.apply_lr()

    def scale_lr(self, factor: float) -> None:
        """Multiplies the learning rate, held or scheduled, from the next step on.

        Raises CommandError if the result is not finite.
        """
        lr: float = self._ds.optimizer.param_groups[0]["lr"]
        if not math.isfinite(factor * self._lr_factor * lr):
            raise CommandError(f"engine {self._name!r}: lr x{factor:g} would be infinite")
        self._lr_factor *= factor
        self.apply_lr()

    def follow_schedule(self) -> None:
        """Returns the learning rate to the schedule, from the next step on."""
        self._held_lr, self._lr_factor = None, 1.0
        self.apply_lr()

    def set_total_steps(self, total_steps: int) -> None:
        """Spans the schedule over another number of optimizer steps, those taken included."""
        factor = build_factor(self._config.scheduler, total_steps)
        scheduler = self._ds.lr_scheduler
        scheduler.lr_lambdas = [factor] * len(scheduler.base_lrs)
        self.apply_lr()

    def set_clip(self, norm: float) -> None:
        """Clips gradients to the L2 norm `norm` from the next step on; 0: no clipping.

        Raises ConfigError if the optimizer would not be correct.
        """
        self._apply_clip(norm)
        self._clip = norm

    def apply_lr(self) -> None:
        """Writes the next step's learning rate, scheduled or held, into every parameter group."""
        base_lrs, scheduler = self._base_lrs, self._ds.lr_scheduler
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        groups = self._ds.optimizer.param_groups
        for group, base, factor in zip(groups, base_lrs, factors, strict=True):
            lr = base * factor
            if self._held_lr is not None:
                lr = self._held_lr * (base / base_lrs[0] if base_lrs[0] else 1.0)
            group["lr"] = lr * self._lr_factor

    def _apply_clip(self, norm: float) -> None:
        assert self._config.optimizer is not None
        check_clipping(self._config.optimizer, engine_state.zero_stage(self._ds), norm)
        engine_state.set_gradient_clipping(self._ds, norm)

    def __iter__(self) -> Any:
        """What differs from the config, a line for each thing."""
        if self._held_lr is not None:
            yield f"lr held at {self._held_lr:g}"
        if self._lr_factor != 1:
            yield f"lr x{self._lr_factor:g}"
        if self._clip is not None:
            yield f"clip {self._clip:g} (config: {self._configured_clip:g})"

    def state_dict(self) -> dict[str, Any]:
        """The live changes, and the configured values that they replace."""
        return {
            "held_lr": self._held_lr,
            "lr_factor": self._lr_factor,
            "schedule": self._schedule,
            "clip": self._clip,
            "configured_clip": self._configured_clip,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, after DeepSpeed's own loading.

        Changes of the config since then take precedence: of optimizer or schedule over the learning
        rate, of `gradient_clipping` over the clipping.
        """
        self._ds.lr_scheduler.base_lrs = list(self._base_lrs)
        self._held_lr, self._lr_factor = state["held_lr"], state["lr_factor"]
        self._clip = state["clip"]
        saved = list(self)
        if state["schedule"] != self._schedule:
            self._held_lr, self._lr_factor = None, 1.0
        if state["configured_clip"] != self._configured_clip:
            self._clip = None
        for text in saved:
            if text not in list(self):
                log.info(
                    "engine %s: dropping the live change %s: the config has changed",
                    self._name,
                    text,
                )
        self.apply_lr()
        self._apply_clip(self._configured_clip if self._clip is None else self._clip)
