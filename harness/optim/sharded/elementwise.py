"""State of the weights' size, and AdamW, for which shards are as good as complete parameters."""

import logging
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from harness.optim.sharded.tensor_groups import NamedState, State, TensorGroup, drop_others
from harness.zero.shards import Shard

log = logging.getLogger(__name__)


class Elementwise(TensorGroup):
    """Tensors whose state has the size of the weights."""

    KEYS: ClassVar[tuple[str, ...]]
    """Of the state."""
    METHOD: ClassVar[str]
    """Whose state it is."""

    def _initial_state(self, number: int) -> State:
        return {key: torch.zeros_like(self.weights[number]) for key in self.KEYS}

    def named_state(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        for shard, state in zip(self.shards, states, strict=True):
            for number, segment in enumerate(shard.own):
                for key in self.KEYS:
                    moment = torch.zeros(_size(shard, number), device=self.device)
                    own = state[key].flatten()[segment.flat_slice]
                    moment[segment.start : segment.stop] = own
                    yield f"{segment.name}/{key}", self._summed(moment)
                yield f"{segment.name}/step", state["step"]

    def _fill(self, number: int, state: State, loaded: NamedState) -> None:
        shard = self.shards[number]
        own = {f"{segment.name}/{key}" for segment in shard.own for key in (*self.KEYS, "step")}
        drop_others(shard, loaded, own, f"{self.METHOD}'s")
        for index, segment in enumerate(shard.own):
            popped = {key: loaded.pop(f"{segment.name}/{key}", None) for key in self.KEYS}
            step = loaded.pop(f"{segment.name}/step", None)
            moments = {key: moment for key, moment in popped.items() if moment is not None}
            if any(m.numel() != _size(shard, index) for m in moments.values()):
                log.warning("%s: reset: the loaded state is not %s's", segment.name, self.METHOD)
                continue
            for key, moment in moments.items():
                own = state[key].view(-1)[segment.flat_slice]
                own.copy_(moment.flatten()[segment.start : segment.stop])
            if step is not None:
                state["step"].copy_(torch.maximum(state["step"], step.to(self.device)))


class Dense(Elementwise):
    """AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; torch's own."""

    KEYS = ("exp_avg", "exp_avg_sq")
    METHOD = "AdamW"

    def update(self, all_finite: Tensor) -> None:
        """Updates the state and the weights if all gradients are finite."""
        beta1, beta2 = self.settings["betas"]
        adamw(
            self.weights,
            self.gradients,
            [state["exp_avg"] for state in self.states],
            [state["exp_avg_sq"] for state in self.states],
            [],
            [state["step"] for state in self.states],
            fused=True,
            found_inf=(~all_finite).float(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.settings["lr"],
            weight_decay=self.settings["weight_decay"],
            eps=self.settings["eps"],
            maximize=False,
        )
        self.end()


def _size(shard: Shard, number: int) -> int:
    """The number of elements of the parameter that segment `number` of each rank belongs to."""
    return max(segments[number].stop for segments in shard.segments)
