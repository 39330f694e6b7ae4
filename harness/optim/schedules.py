"""Learning-rate schedules by name.

A schedule maps the number of steps taken so far to a factor for the optimizer's learning rate. Its
arguments are checked and converted by their annotations (scheduler.py).
"""

import math
from collections.abc import Callable

from harness.errors import ConfigError
from harness.optim.arguments import Steps
from harness.optim.plateau import Factor, Plateau, warm


def constant(total_steps: int, *, warmup: Steps = 0) -> Factor:
    """Linear warm-up from 0 to 1 over `warmup` steps, then 1.

    Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017.
    """
    return lambda step: warm(step, warmup)


def linear(total_steps: int, *, warmup: Steps = 0, floor: float = 0.0) -> Factor:
    """Warm-up, then linear decay from 1 to `floor` at the last step.

    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019.
    """
    return lambda step: (
        warm(step, warmup) * (1 - (1 - floor) * _progress(step, warmup, total_steps))
    )


def cosine(total_steps: int, *, warmup: Steps = 0, floor: float = 0.0) -> Factor:
    """Warm-up, then half a cosine from 1 to `floor` at the last step.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, without
    the restarts.
    """

    def factor(step: int) -> float:
        half_wave = (1 + math.cos(math.pi * _progress(step, warmup, total_steps))) / 2
        return warm(step, warmup) * (floor + (1 - floor) * half_wave)

    return factor


def cosine_with_restarts(
    total_steps: int,
    *,
    warmup: Steps = 0,
    cycles: int = 2,
    decay: float = 1.0,
    floor: float = 0.0,
) -> Factor:
    """Warm-up, then `cycles` equally long parts, each half a cosine from its peak to `floor`.

    The first peak is 1, each later one `decay` times the one before. Loshchilov and Hutter, "SGDR:
    Stochastic Gradient Descent with Warm Restarts", 2017.
    """
    span = max(1, total_steps - warmup)

    def factor(step: int) -> float:
        position = min(max(0, step - warmup), span) * cycles  # in units of 1 / cycles steps
        cycle = min(position // span, cycles - 1)
        peak = max(floor, decay**cycle)
        half_wave = (1 + math.cos(math.pi * (position / span - cycle))) / 2
        return warm(step, warmup) * (floor + (peak - floor) * half_wave)

    return factor


def one_cycle(
    total_steps: int, *, warmup: Steps = 0, start: float = 0.04, floor: float = 4e-6
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


def noam(total_steps: int, *, warmup: Steps = 4000) -> Factor:
    """Linear warm-up to 1 over `warmup` steps, then decay with the inverse square root of the step.

    Vaswani et al., "Attention Is All You Need", 2017, scaled to a peak of 1.
    """
    if warmup < 1:
        raise ConfigError(f"scheduler 'noam': warmup = {warmup}, expected a number >= 1")
    return lambda step: min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


def inverse_sqrt(total_steps: int, *, warmup: Steps = 0, timescale: Steps = 0) -> Factor:
    """Warm-up, then decay with the inverse square root of the steps, whatever the last step is.

    After `timescale` more steps (0: as many as the warm-up, or 10,000 without one) the factor is
    sqrt(1/2). Zhai, Kolesnikov, Houlsby and Beyer, "Scaling Vision Transformers", 2022.
    """
    scale = timescale or warmup or 10_000
    return lambda step: warm(step, warmup) / math.sqrt(1 + max(0, step - warmup) / scale)


def warmup_stable_decay(
    total_steps: int, *, warmup: Steps = 0, decay: Steps = 0, floor: float = 0.0
) -> Factor:
    """Warm-up, then 1, then linear decay to `floor` over the last `decay` steps (0: 10 % of the
    run).

    Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies", 2024.
    """
    decay_start = total_steps - (decay or max(1, round(0.1 * total_steps)))
    return lambda step: (
        warm(step, warmup) * (1 - (1 - floor) * _progress(step, decay_start, total_steps))
    )


def _progress(step: int, warmup: int, total_steps: int) -> float:
    return min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine-with-restarts": cosine_with_restarts,
    "one-cycle": one_cycle,
    "noam": noam,
    "inverse-sqrt": inverse_sqrt,
    "warmup-stable-decay": warmup_stable_decay,
    "plateau": Plateau,
}
