"""An exponential moving average of an engine's weights, at every ZeRO stage.

The average is in the optimizer's state, a tensor beside the moments. So each rank averages its own
shard of the master weights, with no collective; every checkpoint has it; and another layout cuts it
as it cuts a moment. It is that of torch's `AveragedModel` with `get_ema_multi_avg_fn`: the
weights after the first step, and after every other one decay * average + (1 - decay) * weights.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; with exponential
weights as in Tarvainen and Valpola, "Mean teachers are better role models", 2017.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from harness.zero.layout import EMA
from harness.zero.live import base_optimizer, write_weights


class Ema:
    """Follows the weights of one engine."""

    def __init__(self, ds: Any, decay: float):
        """`ds`: the DeepSpeed engine."""
        self._ds = ds
        self._decay = decay
        base_optimizer(ds).register_step_post_hook(self._update)

    @torch.no_grad()
    def _update(self, base: Optimizer, *_: Any) -> None:
        """Updates the average with the parameters that a step has changed."""
        stepped = [
            p
            for group in base.param_groups
            for p in group["params"]
            if p.grad is not None or EMA in base.state.get(p, ())
        ]
        averaged = [p for p in stepped if EMA in base.state[p]]
        for parameter in stepped:
            if EMA not in base.state[parameter]:
                base.state[parameter][EMA] = parameter.detach().clone()
        if averaged:
            averages = [base.state[p][EMA] for p in averaged]
            lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
            lerp(averages, averaged, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the average for its weights; before the first step, with its own.

        Collective. The weights, and their masters, are afterwards what they were, to the bit. No
        gradient may be accumulating.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchanges the master weights and their average."""
        state = base_optimizer(self._ds).state
        averaged = [parameter for parameter in state if EMA in state[parameter]]
        for parameter in averaged:
            kept = parameter.detach().clone()
            parameter.copy_(state[parameter][EMA])
            state[parameter][EMA].copy_(kept)
        if averaged:
            write_weights(self._ds)


def remove_average(ds: Any) -> None:
    """Removes the average from the optimizer's state."""
    for state in base_optimizer(ds).state.values():
        state.pop(EMA, None)
