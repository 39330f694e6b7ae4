"""Tensors of one parameter group that are stepped together, and the phases of a step.

Every tensor group goes through the same three phases, with a collective between them:

    project  ->  reduce-scatter  ->  adapt  ->  all-gather  ->  apply

Low-rank groups are in lowrank.py. W is the number of ranks that share the parameters.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from harness.zero.shards import Shard

log = logging.getLogger(__name__)

ParamGroup = dict[str, Any]
"""A torch parameter group: settings, parameters and their names."""
State = dict[str, Any]
"""The state of one flat."""
NamedState = MutableMapping[str, Tensor]
"""Layout-independent, complete state by `NAME/KEY`, where NAME is a parameter's or a matrix's."""


class TensorGroup(ABC):
    """Tensors of a parameter group that are stepped together."""

    def __init__(self, flats: Sequence[Tensor], shards: Sequence[Shard]):
        self.flats, self.shards = list(flats), list(shards)
        self.shard = self.shards[0]
        self.world = len(self.shard.segments)
        self.device = self.flats[0].device
        self.is_cut = False
        """Whether ranks share matrices, so that a step needs the all-gather."""
        self.settings: ParamGroup = {}
        self.states: list[State] = []
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def begin(self, settings: ParamGroup, states: list[State], loaded: NamedState) -> None:
        """Stores this step's settings, states and fp32 gradients.

        Initializes a new state from `loaded`, and removes the entries used from it.
        """
        self.settings, self.states = settings, states
        gradients = [flat.grad for flat in self.flats if flat.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise ValueError(
                "a gradient is sparse, which APOLLO does not support: use sparse=False"
            )
        if any(gradient.is_complex() for gradient in gradients):
            raise ValueError(
                "a gradient is complex, which APOLLO does not support: use view_as_real"
            )
        self.weights = [flat.detach().float().contiguous() for flat in self.flats]
        self.gradients = [gradient.float().contiguous() for gradient in gradients]
        for number, state in enumerate(states):
            if "step" not in state:
                state["step"] = torch.zeros((), device=self.device)
                state |= self._initial_state(number)
                self._fill(number, state, loaded)

    @abstractmethod
    def named_state(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        """The state by name, each entry complete on every rank. Collective where it is sharded."""

    def step_metrics(self) -> dict[str, Tensor]:
        """For each matrix in the last step: |N| / |R| ("scale"), whether the limiter reduced its
        update ("limited"), and whether this rank has elements of it ("seen"): (n,) each."""
        return {}

    @abstractmethod
    def square_sum(self) -> Tensor:
        """Sum of the squared gradient elements on this rank, without padding: fp64 ()."""

    @abstractmethod
    def project(self) -> Tensor:
        """What to send to each rank, one row per rank: fp32 (W, any)."""

    @abstractmethod
    def adapt(self, received: Tensor, all_finite: Tensor) -> Tensor:
        """Updates the state if all gradients are finite. `received`: the sum of the rows that the
        ranks sent to this one. Returns what to send to all ranks: fp64 (any,)."""

    @abstractmethod
    def apply(self, gathered: Tensor, all_finite: Tensor) -> None:
        """Updates the weights if all gradients are finite. `gathered`: the results of `adapt` on
        all ranks, (W, any)."""

    def end(self) -> None:
        """Writes converted weights back, and drops all references of this step."""
        for flat, weight in zip(self.flats, self.weights, strict=True):
            if flat.data_ptr() != weight.data_ptr():
                flat.copy_(weight)
        self.weights, self.gradients, self.states = [], [], []

    @abstractmethod
    def _initial_state(self, number: int) -> State: ...

    @abstractmethod
    def _fill(self, number: int, state: State, loaded: NamedState) -> None: ...

    def _summed(self, partial: Tensor) -> Tensor:
        """The sum over the ranks of a tensor in which each rank has filled in its own elements, and
        0 elsewhere."""
        if self.world == 1:
            return partial
        total = partial.to(self.shard.device)
        dist.all_reduce(total, group=self.shard.group)
        return total


class Dense(TensorGroup):
    """AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; torch's own."""

    def _initial_state(self, number: int) -> State:
        weight = self.weights[number]
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def named_state(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        for shard, state in zip(self.shards, states, strict=True):
            for number, segment in enumerate(shard.own):
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = torch.zeros(_size(shard, number), device=self.device)
                    own = state[key].flatten()[segment.flat_slice]
                    moment[segment.start : segment.stop] = own
                    yield f"{segment.name}/{key}", self._summed(moment)
                yield f"{segment.name}/step", state["step"]

    def _fill(self, number: int, state: State, loaded: NamedState) -> None:
        shard = self.shards[number]
        for index, segment in enumerate(shard.own):
            popped = {
                key: loaded.pop(f"{segment.name}/{key}", None) for key in ("exp_avg", "exp_avg_sq")
            }
            step = loaded.pop(f"{segment.name}/step", None)
            moments = {key: moment for key, moment in popped.items() if moment is not None}
            if any(moment.numel() != _size(shard, index) for moment in moments.values()):
                log.warning("%s: reset: the loaded state is not AdamW's", segment.name)
                continue
            for key, moment in moments.items():
                own = state[key].view(-1)[segment.flat_slice]
                own.copy_(moment.flatten()[segment.start : segment.stop])
            if step is not None:
                state["step"].copy_(torch.maximum(state["step"], step.to(self.device)))

    def square_sum(self) -> Tensor:
        own = [
            gradient.flatten()[segment.flat_slice]
            for gradient, shard in zip(self.gradients, self.shards, strict=True)
            for segment in shard.own
        ]
        return torch.nn.utils.get_total_norm(own).double().square()

    def project(self) -> Tensor:
        return torch.empty(self.world, 0, device=self.device)

    def adapt(self, received: Tensor, all_finite: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.float64, device=self.device)

    def apply(self, gathered: Tensor, all_finite: Tensor) -> None:
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
