"""Tensors of one parameter group that are stepped together. W: the ranks that share them."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.zero.shards import Shard, ShardError

log = logging.getLogger(__name__)

ParamGroup = dict[str, Any]
"""A torch parameter group: settings, parameters and their names."""
State = dict[str, Any]
"""The state of one flat."""
foreach: Any = torch
"""torch's functions on lists of tensors, which its type stubs lack."""
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
        """Whether ranks share matrices, so that they send results back."""
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
            raise ValueError("a gradient is sparse, which is not supported: use sparse=False")
        if any(gradient.is_complex() for gradient in gradients):
            raise ValueError("a gradient is complex, which is not supported: use view_as_real")
        self.weights = [flat.detach().float().contiguous() for flat in self.flats]
        self.gradients = [gradient.float().contiguous() for gradient in gradients]
        for number, state in enumerate(states):
            if "step" not in state:
                state["step"] = torch.zeros((), device=self.device)
                state |= self._initial_state(number)
                self._fill(number, state, loaded)

    def count_step(self, all_finite: Tensor) -> None:
        """Counts the step, unless it is skipped."""
        steps = [state["step"] for state in self.states]
        foreach._foreach_add_(steps, [all_finite.float()] * len(steps))

    @abstractmethod
    def named_state(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        """The state by name, each entry complete on every rank. Collective where it is sharded."""

    def step_metrics(self) -> dict[str, Tensor]:
        """Metrics of the last step, on the device."""
        return {}

    def square_sum(self) -> Tensor:
        """Sum of the squared gradient elements on this rank, without padding: fp64 ()."""
        own = [
            gradient.flatten()[segment.flat_slice]
            for gradient, shard in zip(self.gradients, self.shards, strict=True)
            for segment in shard.own
        ]
        return torch.nn.utils.get_total_norm(own).double().square()

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


def drop_others(shard: Shard, loaded: NamedState, own: Collection[str], whose: str) -> None:
    """Removes the loaded state of a flat's parameters, and of matrices in them, that another method
    has left: if any entry is not one of `own`. Logs a warning."""
    entries: dict[str, list[str]] = {segment.name: [] for segment in shard.own}
    for entry in loaded:
        owner = entry.rpartition("/")[0]
        name = owner if owner in entries else owner.rpartition("[")[0]
        if name in entries:
            entries[name].append(entry)
    for name, found in entries.items():
        if any(entry not in own for entry in found):
            log.warning("%s: reset: the loaded state is not %s", name, whose)
            for entry in found:
                del loaded[entry]


def all_finite(groups: Sequence[TensorGroup]) -> Tensor:
    """Whether all gradients on this rank, and their squares, are finite: bool ()."""
    return torch.stack([group.square_sum() for group in groups]).sum().isfinite()


def common_shard(groups: Sequence[TensorGroup]) -> Shard:
    """A shard of tensor groups that are stepped together, for its process group. Raises ShardError
    if they have different ones."""
    shard = groups[0].shard
    if any(group.shard.group is not shard.group for group in groups):
        raise ShardError(
            "one step() would update parameters that are sharded over different process groups "
            "(experts, with BF16_Optimizer): use ZeRO stage 2, which steps them separately"
        )
    return shard
