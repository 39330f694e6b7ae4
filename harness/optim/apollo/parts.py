"""A step in parts: what becomes of the tensors of one parameter group, and what ranks exchange.

A step has three phases with a collective between them, the same for every part:

    project  ->  reduce-scatter  ->  adapt  ->  all-gather  ->  apply

Low-rank parts have a file of their own, lowrank.py. W is the number of ranks that share.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from harness.zero.shards import Shard, ShardError

log = logging.getLogger(__name__)

Group = dict[str, Any]
State = dict[str, Any]
Named = MutableMapping[str, Tensor]
"""State in no layout: `NAME/KEY`, whole, where NAME is a parameter's or a matrix's."""


class Part(ABC):
    """Some tensors of a parameter group that are stepped together."""

    def __init__(self, flats: Sequence[Tensor], shards: Sequence[Shard]):
        self.flats, self.shards = list(flats), list(shards)
        self.shard = self.shards[0]
        self.world = len(self.shard.segments)
        self.device = self.flats[0].device
        self.is_cut = False
        """Whether ranks share matrices, so that there is something to gather."""
        self.group: Group = {}
        self.states: list[State] = []
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def begin(self, group: Group, states: list[State], named: Named) -> None:
        """Takes up this step's settings, state, and gradients, in fp32.

        State that is new takes what is its own from `named`, and takes it out.
        """
        self.group, self.states = group, states
        gradients = [flat.grad for flat in self.flats if flat.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise ValueError("a gradient is sparse, which APOLLO does not take: use sparse=False")
        if any(gradient.is_complex() for gradient in gradients):
            raise ValueError("a gradient is complex, which APOLLO does not take: use view_as_real")
        self.weights = [flat.detach().float().contiguous() for flat in self.flats]
        self.gradients = [gradient.float().contiguous() for gradient in gradients]
        for number, state in enumerate(states):
            if "step" not in state:
                state["step"] = torch.zeros((), device=self.device)
                state |= self._first_state(number)
                self._adopt(number, state, named)

    @abstractmethod
    def named(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        """The state by name, each piece whole, on every rank. Collective where it is sharded."""

    def telemetry(self) -> dict[str, Tensor]:
        """Of every matrix in the last step: |N| / |R| ("scale"), whether the limiter held it back
        ("limited"), and whether this rank knows of it ("seen"): (n,) each."""
        return {}

    @abstractmethod
    def square_sum(self) -> Tensor:
        """Sum of the squares of all gradients' elements here, without padding: fp64 ()."""

    @abstractmethod
    def project(self) -> Tensor:
        """What the other ranks need: fp32 (W, any), a row for each."""

    @abstractmethod
    def adapt(self, received: Tensor, all_finite: Tensor) -> Tensor:
        """Updates the state, if all is well; `received` is the sum of what the ranks sent to this
        one. What all of them need: fp64 (any,)."""

    @abstractmethod
    def apply(self, told: Tensor, all_finite: Tensor) -> None:
        """Updates the weights, if all is well. `told`: what each rank gave, (W, any)."""

    def end(self) -> None:
        """Writes weights that had to be converted back, and lets go of everything."""
        for flat, weight in zip(self.flats, self.weights, strict=True):
            if flat.data_ptr() != weight.data_ptr():
                flat.copy_(weight)
        self.weights, self.gradients, self.states = [], [], []

    @abstractmethod
    def _first_state(self, number: int) -> State: ...

    @abstractmethod
    def _adopt(self, number: int, state: State, named: Named) -> None: ...

    def _joined(self, mine: Tensor) -> Tensor:
        """A tensor that every rank has filled where it knows it, and left 0 elsewhere."""
        if self.world == 1:
            return mine
        whole = mine.to(self.shard.device)
        dist.all_reduce(whole, group=self.shard.group)
        return whole


class Dense(Part):
    """AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; torch's own."""

    def _first_state(self, number: int) -> State:
        weight = self.weights[number]
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def named(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        for shard, state in zip(self.shards, states, strict=True):
            for number, piece in enumerate(shard.own):
                for key in ("exp_avg", "exp_avg_sq"):
                    whole = torch.zeros(_size(shard, number), device=self.device)
                    here = state[key].flatten()[piece.offset : piece.offset + piece.length]
                    whole[piece.start : piece.start + piece.length] = here
                    yield f"{piece.name}/{key}", self._joined(whole)
                yield f"{piece.name}/step", state["step"]

    def _adopt(self, number: int, state: State, named: Named) -> None:
        shard = self.shards[number]
        for place, piece in enumerate(shard.own):
            found = {
                key: named.pop(f"{piece.name}/{key}", None) for key in ("exp_avg", "exp_avg_sq")
            }
            step = named.pop(f"{piece.name}/step", None)
            moments = {key: whole for key, whole in found.items() if whole is not None}
            if any(whole.numel() != _size(shard, place) for whole in moments.values()):
                log.warning("%s: its state is not that of AdamW; it starts anew", piece.name)
                continue
            for key, whole in moments.items():
                here = state[key].view(-1)[piece.offset : piece.offset + piece.length]
                here.copy_(whole.flatten()[piece.start : piece.start + piece.length])
            if step is not None:
                state["step"].copy_(torch.maximum(state["step"], step.to(self.device)))

    def square_sum(self) -> Tensor:
        stretches = [
            gradient.flatten()[piece.offset : piece.offset + piece.length]
            for gradient, shard in zip(self.gradients, self.shards, strict=True)
            for piece in shard.own
        ]
        return torch.nn.utils.get_total_norm(stretches).double().square()

    def project(self) -> Tensor:
        return torch.empty(self.world, 0, device=self.device)

    def adapt(self, received: Tensor, all_finite: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.float64, device=self.device)

    def apply(self, told: Tensor, all_finite: Tensor) -> None:
        beta1, beta2 = self.group["betas"]
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
            lr=self.group["lr"],
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
            maximize=False,
        )
        self.end()


def _size(shard: Shard, number: int) -> int:
    """The elements of a parameter, of which every rank has piece `number`."""
    return max(segments[number].start + segments[number].length for segments in shard.segments)


class Exchange:
    """The collectives of one step, for all its parts at once; without ranks that share, none."""

    def __init__(self, parts: Sequence[Part]):
        """Raises ShardError if the parts are sharded among several groups of ranks."""
        self._shard = parts[0].shard
        self._world = parts[0].world
        if any(part.shard.group is not self._shard.group for part in parts):
            raise ShardError(
                "one step() is to step parameters that are sharded among different groups of ranks "
                "(experts, with BF16_Optimizer): use ZeRO stage 2, which steps them one by one"
            )

    def reduce_scatter(self, sent: Sequence[Tensor]) -> list[Tensor]:
        """For every tensor (W, any), its row for this rank, summed over the ranks: (any,)."""
        outgoing = torch.cat(list(sent), dim=1)
        incoming = outgoing[0]
        if self._world > 1:
            outgoing = outgoing.to(self._shard.device)
            incoming = torch.empty_like(outgoing[0])
            dist.reduce_scatter_tensor(incoming, outgoing.flatten(), group=self._shard.group)
            incoming = incoming.to(sent[0].device)
        return list(incoming.split([tensor.shape[1] for tensor in sent]))

    def all_gather(self, told: Sequence[Tensor]) -> list[Tensor]:
        """For every tensor (any,) those of all ranks: (W, any)."""
        mine = torch.cat(list(told)).to(self._shard.device)
        heard = torch.empty(self._world, len(mine), dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(heard.view(-1), mine, group=self._shard.group)
        return list(heard.to(told[0].device).split([len(tensor) for tensor in told], dim=1))
