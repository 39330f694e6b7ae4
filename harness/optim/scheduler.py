"""An engine's schedule, from its table in the config."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from harness.config.engine_sections import SchedulerConfig
from harness.errors import ConfigError, did_you_mean
from harness.optim.arguments import check_arguments, converted
from harness.optim.plateau import Factor, Plateau
from harness.optim.schedules import SCHEDULES
from harness.utils import import_path


class Schedule:
    """The factor of an engine's learning rate at each of its optimizer steps.

    It depends on the step alone, except for "plateau", which has a state.
    """

    def __init__(self, config: SchedulerConfig | None, total_steps: int):
        """The schedule that the config names (constant if None). Raises ConfigError."""
        self._config = config or SchedulerConfig(name="constant")
        self._factor = build_factor(self._config, total_steps)

    def __call__(self, step: int) -> float:
        """The factor after `step` optimizer steps. Raises ConfigError if it is not a number >= 0,
        which only a schedule by import path may return."""
        return _checked(self._config.name, self._factor, step)

    def span(self, total_steps: int) -> None:
        """Spans another number of optimizer steps, those taken included."""
        state = self.state_dict()
        self._factor = build_factor(self._config, total_steps)
        self.load_state_dict(state)

    def awaits(self, step: int) -> bool:
        """Whether it depends on an evaluation at a step of the run that has not been counted."""
        return isinstance(self._factor, Plateau) and self._factor.awaits(step)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Counts the evaluation at a step of the run; whether that changed the state."""
        return isinstance(self._factor, Plateau) and self._factor.evaluated(step, metrics)

    def state_dict(self) -> dict[str, Any]:
        """The state of "plateau"; {} for all others."""
        return self._factor.state_dict() if isinstance(self._factor, Plateau) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; ignored if the schedule is another one now."""
        if state and isinstance(self._factor, Plateau):
            self._factor.load_state_dict(state)


def build_factor(config: SchedulerConfig, total_steps: int) -> Any:
    """The `Factor` that the config names, over `total_steps` optimizer steps.

    Raises ConfigError for an unknown name or argument, or a result that is not a factor.
    """
    label = f"scheduler {config.name!r}"
    make: Any
    if ":" in config.name:
        make, args = import_path(config.name), config.args
        if not callable(make):
            raise ConfigError(f"{label} is not a function")
        check_arguments(label, make, args)
    else:
        if config.name not in SCHEDULES:
            raise ConfigError(
                f"{label} is unknown{did_you_mean(config.name, SCHEDULES)}; known: "
                f"{', '.join(SCHEDULES)}, or an import path such as 'my_schedules:staircase'"
            )
        make = SCHEDULES[config.name]
        check_arguments(label, make, config.args)
        kinds = inspect.signature(make).parameters
        args = {
            key: converted(label, key, value, kinds[key].annotation, total_steps)
            for key, value in config.args.items()
        }
    try:
        factor: Any = make(total_steps, **args)
        is_function = callable(factor)
        for step in (0, total_steps) if is_function else ():
            _checked(config.name, factor, step)
    except ConfigError:
        raise
    except Exception as error:  # the user's own function may raise any
        raise ConfigError(f"{label}: {error}") from error
    if not is_function:
        raise ConfigError(f"{label} returned {factor!r:.80}, expected a function of the step")
    return factor


def build_scheduler(optimizer: Optimizer, schedule: Schedule) -> LambdaLR:
    """A torch scheduler that applies the schedule to every parameter group."""
    return LambdaLR(optimizer, lambda step: schedule(step))  # a plain function: it has no state


def _checked(name: str, factor: Factor, step: int) -> float:
    value = float(factor(step))
    if not 0 <= value < math.inf:
        raise ConfigError(
            f"scheduler {name!r}: the factor at step {step} is {value!r}, expected a number >= 0"
        )
    return value
