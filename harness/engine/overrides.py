"""The learning rates and the clipping of an engine: scheduled, and as changed by live commands."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.engine_sections import DEFAULT_GROUP, EngineConfig
from harness.errors import CommandError
from harness.optim.scheduler import Schedule
from harness.optim.zero_compatibility import check_clipping
from harness.zero import engine_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Change:
    """What live commands have done to the learning rate of a group."""

    held: float | None = None
    """The rate that replaces the schedule."""
    factor: float = 1.0


class Overrides:
    """Live changes of a trained engine, and its schedule; part of every checkpoint.

    The learning rate of a step is the scheduled or a held one, times a factor, for each parameter
    group of the config. Several of torch's groups may belong to one of them.
    """

    def __init__(
        self,
        name: str,
        ds: Any,
        config: EngineConfig,
        schedule: Schedule,
        torch_groups: Sequence[Mapping[str, Any]],
    ):
        """`ds`: the DeepSpeed engine. `torch_groups`: the configured `lr` of every one of torch's
        parameter groups, and the `name` of its group in the config."""
        self._name = name
        self._ds = ds
        self._config = config
        self._schedule = schedule
        self._base_lrs: list[float] = [group["lr"] for group in torch_groups]
        self._names: list[str] = [group.get("name", DEFAULT_GROUP) for group in torch_groups]
        self._first_lrs: dict[str, float] = {}
        for group, lr in zip(self._names, self._base_lrs, strict=True):
            self._first_lrs.setdefault(group, lr)
        self._changes = dict.fromkeys(self._names, _Change())
        self._clip: float | None = None
        self.configured_clip: float = ds.gradient_clipping()
        """The norm that gradients are clipped to without live changes; DeepSpeed's default is 1."""
        groups = self._first_lrs.items() if len(self._first_lrs) > 1 else ()
        self._saved: dict[str, float] = {}  # the next step's rates, in the checkpoint
        self._is_reconfigured = False  # since the checkpoint
        self._configured = repr((config.optimizer, config.scheduler, *groups))

    @property
    def groups(self) -> list[str]:
        """The names of the parameter groups."""
        return list(self._changes)

    def set_lr(self, lr: float, group: str | None = None) -> None:
        """Holds the learning rate at `lr` from the next step on, regardless of the schedule.

        Without a `group` the others keep their configured ratio to the first.
        """
        first = group or self.groups[0]
        for name in self._chosen(group):
            self._changes[name] = _Change(held=lr * self._ratio(self._first_lrs[name], first))
        self.apply_lr()

    def scale_lr(self, factor: float, group: str | None = None) -> None:
        """Multiplies the learning rate, held or scheduled, from the next step on.

        Raises CommandError if the result is not finite.
        """
        rates = dict(zip(self._names, self._current_lrs(), strict=True))
        for name in self._chosen(group):
            if not math.isfinite(factor * self._changes[name].factor * rates[name]):
                raise CommandError(f"engine {self._name!r}: lr x{factor:g} would be infinite")
        for name in self._chosen(group):
            old = self._changes[name]
            self._changes[name] = _Change(old.held, old.factor * factor)
        self.apply_lr()

    def follow_schedule(self, group: str | None = None) -> None:
        """Returns the learning rate to the schedule, from the next step on."""
        self._changes |= dict.fromkeys(self._chosen(group), _Change())
        self.apply_lr()

    def set_total_steps(self, total_steps: int) -> None:
        """Spans the schedule over another number of optimizer steps, those taken included."""
        self._schedule.span(total_steps)
        self.apply_lr()

    def awaits_evaluation(self, step: int) -> bool:
        """Whether the schedule depends on an evaluation at a step of the run that is missing."""
        return self._schedule.awaits(step)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Lets the schedule react to the evaluation at a step of the run. Returns whether that
        changed its state. Raises ConfigError if the evaluation lacks the schedule's metric."""
        is_changed = self._schedule.evaluated(step, metrics)
        self.apply_lr()
        return is_changed

    def set_clip(self, norm: float) -> None:
        """Clips gradients to the L2 norm `norm` from the next step on; 0: no clipping.

        Raises ConfigError if the optimizer would not be correct.
        """
        self._apply_clip(norm)
        self._clip = norm

    def apply_lr(self) -> None:
        """Writes the next step's learning rate, scheduled or held, into every parameter group."""
        factor = self._schedule(self._ds.lr_scheduler.last_epoch)
        groups = self._ds.optimizer.param_groups
        for group, name, base in zip(groups, self._names, self._base_lrs, strict=True):
            change = self._changes[name]
            lr = base * factor if change.held is None else change.held * self._ratio(base, name)
            group["lr"] = lr * change.factor

    def rates(self) -> dict[str, float]:
        """The learning rates of the next step under their log names: `lr` of the first group, and
        `lr/GROUP` of the others."""
        rates: dict[str, float] = {}
        for name, lr in zip(self._names, self._current_lrs(), strict=True):
            rates.setdefault("lr" if name == self._names[0] else f"lr/{name}", lr)
        return rates

    def differs_from_saved(self) -> Iterator[str]:
        """What a resume does to the learning rate, a line for each group whose rate is not the
        checkpoint's. Nothing after one of before, which does not tell."""
        why = "the schedule spans another number of steps"
        if self._is_reconfigured:
            why = "the config has another optimizer or schedule"
        for name, rate in self.rates().items():
            saved = self._saved.get(name, rate)
            if not math.isclose(rate, saved, rel_tol=1e-6):
                yield f"{name} {saved:.4g} in the checkpoint, {rate:.4g} from here on: {why}"

    def _chosen(self, group: str | None) -> Iterable[str]:
        return self._changes if group is None else [group]

    def _ratio(self, base: float, group: str) -> float:
        """A configured learning rate by that of a group."""
        first = self._first_lrs[group]
        return base / first if first else 1.0

    def _current_lrs(self) -> list[float]:
        return [group["lr"] for group in self._ds.optimizer.param_groups]

    def _apply_clip(self, norm: float) -> None:
        assert self._config.optimizer is not None
        check_clipping(self._config.optimizer, engine_state.zero_stage(self._ds), norm)
        engine_state.set_gradient_clipping(self._ds, norm)

    def __iter__(self) -> Iterator[str]:
        """What differs from the config, a line for each thing."""
        first = self.groups[0]
        for name, change in self._changes.items():
            label = "lr" if name == first else f"lr/{name}"
            is_as_first = name != first and change == self._as(self._changes[first], name)
            if change.held is not None and not is_as_first:
                yield f"{label} held at {change.held:g}"
            if change.factor != 1 and not is_as_first:
                yield f"{label} x{change.factor:g}"
        if self._clip is not None:
            yield f"clip {self._clip:g} (config: {self.configured_clip:g})"

    def _as(self, first: _Change, name: str) -> _Change:
        """The change of a group by a command for all groups, from that of the first one."""
        if first.held is None:
            return first
        ratio = self._ratio(self._first_lrs[name], self.groups[0])
        return _Change(first.held * ratio, first.factor)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, the live changes, and the configured values that they replace."""
        first, *others = self.groups
        changes = {name: (change.held, change.factor) for name, change in self._changes.items()}
        return {
            "held_lr": changes[first][0],
            "lr_factor": changes[first][1],
            "lr_of_groups": {name: changes[name] for name in others},
            "schedule": self._configured,
            "rates": self.rates(),
            "schedule_state": self._schedule.state_dict(),
            "clip": self._clip,
            "configured_clip": self.configured_clip,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, after DeepSpeed's own loading.

        Changes of the config since then take precedence: of optimizer, groups or schedule over the
        learning rates, of `gradient_clipping` over the clipping.
        """
        self._ds.lr_scheduler.base_lrs = list(self._base_lrs)
        self._schedule.load_state_dict(state.get("schedule_state", {}))
        self._saved = state.get("rates", {})
        first = _Change(state["held_lr"], state["lr_factor"])
        self._changes = {name: self._as(first, name) for name in self.groups}
        for name, (held, factor) in state.get("lr_of_groups", {}).items():
            if name in self._changes:
                self._changes[name] = _Change(held, factor)
        self._clip = state["clip"]
        saved = list(self)
        self._is_reconfigured = state["schedule"] != self._configured
        if self._is_reconfigured:
            self._changes = dict.fromkeys(self._changes, _Change())
        if state["configured_clip"] != self.configured_clip:
            self._clip = None
        for text in saved:
            if text not in list(self):
                log.info(
                    "engine %s: dropping the live change %s: the config has changed",
                    self._name,
                    text,
                )
        self.apply_lr()
        self._apply_clip(self.configured_clip if self._clip is None else self._clip)
