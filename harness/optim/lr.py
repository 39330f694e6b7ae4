"""Learning-rate schedules by name, all through torch's own scheduler.

A schedule is a factor on the optimizer's learning rate, as a function of the steps already taken.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from harness.config import SchedulerConfig
from harness.errors import ConfigError, did_you_mean
from harness.optim.build import check_arguments

Factor = Callable[[int], float]


def constant(total_steps: int, *, warmup: int = 0) -> Factor:
    """1, after a linear warm-up from 0 over `warmup` steps."""
    return lambda step: _warm(step, warmup)


def linear(total_steps: int, *, warmup: int = 0, floor: float = 0.0) -> Factor:
    """Falls on a line from 1, after the warm-up, to `floor` at the last step."""
    return lambda step: (
        _warm(step, warmup) * (1 - (1 - floor) * _progress(step, warmup, total_steps))
    )


def cosine(total_steps: int, *, warmup: int = 0, floor: float = 0.0) -> Factor:
    """Falls on half a cosine from 1, after the warm-up, to `floor` at the last step.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, without
    the restarts.
    """

    def factor(step: int) -> float:
        half_wave = (1 + math.cos(math.pi * _progress(step, warmup, total_steps))) / 2
        return _warm(step, warmup) * (floor + (1 - floor) * half_wave)

    return factor


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _progress(step: int, warmup: int, total_steps: int) -> float:
    return min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}


def build_factor(config: SchedulerConfig | None, total_steps: int) -> Factor:
    """The schedule that the config names (constant if None), over `total_steps` optimizer steps.

    Raises ConfigError for an unknown name or argument.
    """
    config = config or SchedulerConfig(name="constant")
    make = SCHEDULES.get(config.name)
    if make is None:
        hint = did_you_mean(config.name, SCHEDULES)
        raise ConfigError(
            f"scheduler {config.name!r} is unknown{hint}; known: {', '.join(SCHEDULES)}"
        )
    check_arguments(f"scheduler {config.name!r}", make, config.args)
    for key, value in config.args.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(
                f"scheduler {config.name!r}: {key} = {value!r}, expected a number from 0 on"
            )
    return make(total_steps, **config.args)


def build_scheduler(
    optimizer: Optimizer, config: SchedulerConfig | None, total_steps: int
) -> LambdaLR:
    """`build_factor` as a scheduler of the optimizer."""
    return LambdaLR(optimizer, build_factor(config, total_steps))
