"""Learning-rate schedules by name, all run by torch's LambdaLR.

A schedule maps the number of steps taken so far to a factor for the optimizer's learning rate.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from harness.config.engine_sections import SchedulerConfig
from harness.errors import ConfigError, did_you_mean
from harness.optim.arguments import check_arguments

Factor = Callable[[int], float]


def constant(total_steps: int, *, warmup: int = 0) -> Factor:
    """Linear warm-up from 0 to 1 over `warmup` steps, then 1."""
    return lambda step: _warm(step, warmup)


def linear(total_steps: int, *, warmup: int = 0, floor: float = 0.0) -> Factor:
    """Warm-up, then linear decay from 1 to `floor` at the last step."""
    return lambda step: (
        _warm(step, warmup) * (1 - (1 - floor) * _progress(step, warmup, total_steps))
    )


def cosine(total_steps: int, *, warmup: int = 0, floor: float = 0.0) -> Factor:
    """Warm-up, then half a cosine from 1 to `floor` at the last step.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, without
    the restarts.
    """

    def factor(step: int) -> float:
        half_wave = (1 + math.cos(math.pi * _progress(step, warmup, total_steps))) / 2
        return _warm(step, warmup) * (floor + (1 - floor) * half_wave)

    return factor


def one_cycle(
    total_steps: int, *, warmup: int = 0, start: float = 0.04, floor: float = 4e-6
) -> Factor:
    """Half a cosine from `start` up to 1 over `warmup` steps (0: 30 % of the run), then another
    down to `floor` at the last step.

    Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning
    Rates", 2018, with the proportions of torch's OneCycleLR.
    """
    rise = warmup or max(1, round(0.3 * total_steps))

    def factor(step: int) -> float:
        bottom, phase = start, 1 - step / rise
        if step >= rise:
            bottom, phase = floor, _progress(step, rise, total_steps)
        return bottom + (1 - bottom) * (1 + math.cos(math.pi * phase)) / 2

    return factor


def noam(total_steps: int, *, warmup: int = 4000) -> Factor:
    """Linear warm-up to 1 over `warmup` steps, then decay with the inverse square root of the step.

    Vaswani et al., "Attention Is All You Need", 2017, scaled to a peak of 1.
    """
    if warmup < 1:
        raise ConfigError(f"scheduler 'noam': warmup = {warmup}, expected a number >= 1")
    return lambda step: min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


def warmup_stable_decay(
    total_steps: int, *, warmup: int = 0, decay: int = 0, floor: float = 0.0
) -> Factor:
    """Warm-up, then 1, then linear decay to `floor` over the last `decay` steps (0: 10 % of the
    run).

    Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies", 2024.
    """
    decay_start = total_steps - (decay or max(1, round(0.1 * total_steps)))
    return lambda step: (
        _warm(step, warmup) * (1 - (1 - floor) * _progress(step, decay_start, total_steps))
    )


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _progress(step: int, warmup: int, total_steps: int) -> float:
    return min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "one-cycle": one_cycle,
    "noam": noam,
    "warmup-stable-decay": warmup_stable_decay,
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
                f"scheduler {config.name!r}: {key} = {value!r}, expected a number >= 0"
            )
    return make(total_steps, **config.args)


def build_scheduler(
    optimizer: Optimizer, config: SchedulerConfig | None, total_steps: int
) -> LambdaLR:
    """A torch scheduler that applies `build_factor` to the optimizer."""
    return LambdaLR(optimizer, build_factor(config, total_steps))
