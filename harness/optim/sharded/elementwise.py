"""State of the weights' size, and AdamW, for which shards are as good as complete parameters."""

import logging
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from harness.optim.sharded.tensor_groups import NamedState, State, TensorGroup
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
        others = _of_other_methods(shard, self.KEYS, loaded)
        for index, segment in enumerate(shard.own):
            popped = {key: loaded.pop(f"{segment.name}/{key}", None) for key in self.KEYS}
            step = loaded.pop(f"{segment.name}/step", None)
            moments = {key: moment for key, moment in popped.items() if moment is not None}
            is_other = not moments and segment.name in others
            if is_other or any(m.numel() != _size(shard, index) for m in moments.values()):
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


def _of_other_methods(shard: Shard, keys: Sequence[str], loaded: NamedState) -> set[str]:
    """Removes what another method has left of a flat's parameters, or of matrices in them, from the
    loaded state. Returns the names of these parameters."""
    names = {segment.name for segment in shard.own}
    found: set[str] = set()
    for entry in list(loaded):
        owner, _, key = entry.rpartition("/")
        name = owner.partition("[")[0]
        if name in names and (owner != name or key not in (*keys, "step")):
            found.add(name)
            del loaded[entry]
    return found


def _size(shard: Shard, number: int) -> int:
    """The number of elements of the parameter that segment `number` of each rank belongs to."""
    return max(segments[number].stop for segments in shard.segments)
