"""An exponential moving average of an engine's weights, at every ZeRO stage.

The EMA is part of the optimizer's state, next to the moments. So each rank averages its own shard
of the master weights, with no collective; every checkpoint has it; and it is resharded like a
moment. It equals that of torch's `AveragedModel` with `get_ema_multi_avg_fn`: the weights after the
first step, and after every other one decay * EMA + (1 - decay) * weights.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; with exponential
weights as in Tarvainen and Valpola, "Mean teachers are better role models", 2017.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from harness.zero.engine_state import base_optimizer, write_weights
from harness.zero.layout import EMA


class Ema:
    """Averages the weights of one engine."""

    def __init__(self, ds: Any, decay: float):
        """`ds`: the DeepSpeed engine."""
        self._ds = ds
        self._decay = decay
        base_optimizer(ds).register_step_post_hook(self._update)

    @torch.no_grad()
    def _update(self, base: Optimizer, *_: Any) -> None:
        """Updates the EMA with the parameters that a step has changed."""
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
        """The model with its EMA weights; before the first step, with its own.

        Collective. Afterwards the weights and their masters are restored, bit for bit. Call it
        between optimizer steps only: no gradient may be accumulating.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swaps the master weights and their EMA."""
        state = base_optimizer(self._ds).state
        averaged = [parameter for parameter in state if EMA in state[parameter]]
        for parameter in averaged:
            weight = parameter.detach().clone()
            parameter.copy_(state[parameter][EMA])
            state[parameter][EMA].copy_(weight)
        if averaged:
            write_weights(self._ds)


def remove_average(ds: Any) -> None:
    """Removes the EMA from the optimizer's state."""
    for state in base_optimizer(ds).state.values():
        state.pop(EMA, None)
