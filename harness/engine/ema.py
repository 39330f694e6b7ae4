"""An exponential moving average of an engine's weights, at every ZeRO stage.

The average lies in the optimizer's state, a tensor beside the moments. So each rank averages its
own shard of the master weights, with no collective; every checkpoint holds it; and another layout
cuts it as it cuts a moment. It is that of torch's `AveragedModel` with `get_ema_multi_avg_fn`: the
weights after the first step, and after every other one decay * average + (1 - decay) * weights.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; with exponential
weights as in Tarvainen and Valpola, "Mean teachers are better role models", 2017.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

KEY = "ema"
"""The average's key in the optimizer's state of a parameter."""


class Ema:
    """Follows the weights of one engine."""

    def __init__(self, optimizer: Any, decay: float):
        """`optimizer`: DeepSpeed's, or torch's where DeepSpeed does not wrap it."""
        self._optimizer = optimizer
        self._decay = decay
        base_of(optimizer).register_step_post_hook(self._update)

    @torch.no_grad()
    def _update(self, base: Optimizer, *_: Any) -> None:
        """Takes in what a step has made of its parameters."""
        stepped = [
            p
            for group in base.param_groups
            for p in group["params"]
            if p.grad is not None or KEY in base.state.get(p, ())
        ]
        averaged = [p for p in stepped if KEY in base.state[p]]
        for parameter in stepped:
            if KEY not in base.state[parameter]:
                base.state[parameter][KEY] = parameter.detach().clone()
        if averaged:
            averages = [base.state[p][KEY] for p in averaged]
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
        state = base_of(self._optimizer).state
        averaged = [parameter for parameter in state if KEY in state[parameter]]
        for parameter in averaged:
            kept = parameter.detach().clone()
            parameter.copy_(state[parameter][KEY])
            state[parameter][KEY].copy_(kept)
        if averaged:
            write_weights(self._optimizer)


def forget(optimizer: Any) -> None:
    """Takes the average out of the optimizer's state."""
    for state in base_of(optimizer).state.values():
        state.pop(KEY, None)


def base_of(optimizer: Any) -> Optimizer:
    """The torch optimizer below DeepSpeed's."""
    return optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer


def write_weights(optimizer: Any) -> None:
    """Makes the model's weights of their masters, as DeepSpeed does after a step. Collective."""
    if isinstance(optimizer, Optimizer):
        return  # the weights are their own masters
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if kept_whole := optimizer.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)
    else:  # 16 bits at stage 0: the masters of a group are a list, or one flat tensor
        flat = getattr(optimizer, "fp32_groups_flat", None)
        groups = optimizer.fp16_groups
        masters = optimizer.fp32_groups if flat is None else map(_unflattened, flat, groups)
        for weights, group in zip(groups, masters, strict=True):
            for weight, master in zip(weights, group, strict=True):
                weight.data.copy_(master)


def _unflattened(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
