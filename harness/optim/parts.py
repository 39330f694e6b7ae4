"""What APOLLO does with the tensors of one parameter group: low-rank, or dense.

A step has three phases with a collective between them, the same for every part:

    project  ->  reduce-scatter  ->  adapt  ->  all-gather  ->  apply

The equations, and where they are from, stand at the top of apollo.py. Shapes: C slots of channels,
of which the first c carry state on this rank; r the rank; W ranks; n matrices.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from harness.optim.channels import Block, Matrix, Plan
from harness.optim.philox import gaussian, key_of, rademacher
from harness.optim.shards import Shard, ShardError

Group = dict[str, Any]
State = dict[str, Any]

foreach: Any = torch
"""torch's functions on lists of tensors, which its type stubs do not tell of."""

PROJECTIONS = {"gaussian": gaussian, "rademacher": rademacher}

KEPT_BYTES = 64 * 2**20
"""Bytes of projections that an optimizer keeps until their refresh; more are made at each step."""


class Part:
    """Some tensors of a parameter group that are stepped together."""

    def __init__(self, flats: Sequence[Tensor], shards: Sequence[Shard]):
        self.flats, self.shards = list(flats), list(shards)
        self.shard = self.shards[0]
        self.world = len(self.shard.pieces)
        self.device = self.flats[0].device
        self.is_cut = False
        """Whether ranks share channels, so that there is something to gather."""
        self.group: Group = {}
        self.states: list[State] = []
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def begin(self, group: Group, states: list[State]) -> None:
        """Takes up this step's settings, state, and gradients, in fp32."""
        self.group, self.states = group, states
        self.weights = [flat.detach().float().contiguous() for flat in self.flats]
        self.gradients = [
            flat.grad.float().contiguous() for flat in self.flats if flat.grad is not None
        ]
        for number, state in enumerate(states):
            if "step" not in state:
                state["step"] = torch.zeros((), device=self.device)
                state |= self._first_state(number)

    def square_sum(self) -> Tensor:
        """Sum of the squares of all gradients' elements here, without padding: fp64 ()."""
        raise NotImplementedError

    def project(self) -> Tensor:
        """What the other ranks need: fp32 (W, any), a row for each."""
        raise NotImplementedError

    def adapt(self, received: Tensor, well: Tensor) -> Tensor:
        """Updates the state, if all is well; `received` is the sum of what the ranks sent to this
        one. What all of them need: fp64 (any,)."""
        raise NotImplementedError

    def apply(self, told: Tensor, well: Tensor) -> None:
        """Updates the weights, if all is well. `told`: what each rank gave, (W, any)."""
        raise NotImplementedError

    def end(self) -> None:
        """Writes weights that had to be converted back, and lets go of everything."""
        for flat, weight in zip(self.flats, self.weights, strict=True):
            if flat.data_ptr() != weight.data_ptr():
                flat.copy_(weight)
        self.weights, self.gradients, self.states = [], [], []

    def _first_state(self, number: int) -> State:
        raise NotImplementedError


class Dense(Part):
    """AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; torch's own."""

    def _first_state(self, number: int) -> State:
        weight = self.weights[number]
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def square_sum(self) -> Tensor:
        stretches = [
            gradient.flatten()[piece.offset : piece.offset + piece.length]
            for gradient, shard in zip(self.gradients, self.shards, strict=True)
            for piece in shard.mine
        ]
        return torch.nn.utils.get_total_norm(stretches).double().square()

    def project(self) -> Tensor:
        return torch.empty(self.world, 0, device=self.device)

    def adapt(self, received: Tensor, well: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.float64, device=self.device)

    def apply(self, told: Tensor, well: Tensor) -> None:
        beta1, beta2 = self.group["betas"]
        adamw(
            self.weights,
            self.gradients,
            [state["exp_avg"] for state in self.states],
            [state["exp_avg_sq"] for state in self.states],
            [],
            [state["step"] for state in self.states],
            fused=True,
            found_inf=(~well).float(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.group["lr"],
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
            maximize=False,
        )
        self.end()


class LowRank(Part):
    """APOLLO, or with scale_type "tensor" APOLLO-Mini."""

    def __init__(
        self,
        flats: Sequence[Tensor],
        shards: Sequence[Shard],
        matrices: Mapping[str, Sequence[Matrix]],
        projections: "Projections",
    ):
        """`matrices`: those of every parameter, by its name."""
        super().__init__(flats, shards)
        self._kept = projections
        self.plan = Plan(shards, matrices)
        self.is_cut = bool(self.plan.shared)
        count = len(self.plan.matrices)
        self._matrix_of_slot = self.plan.matrix_of_slot.to(self.device)
        self._flat_of_matrix = torch.tensor(self.plan.flat_of_matrix, device=self.device)
        here = self._matrix_of_slot[: self.plan.rows_here]
        first = self.plan.rows_here + self.plan.rank * self.plan.chunk
        dealt = self._matrix_of_slot[first : first + self.plan.chunk]
        counts = [torch.bincount(slots, minlength=count + 1) for slots in (here, dealt)]
        self._channels_of = torch.cat(counts)  # rows of state by matrix: here whole, then dealt
        self._inner_of: dict[int, range] = {}  # the inner indices of a matrix that are needed here
        for block in self.plan.blocks:
            known = self._inner_of.get(block.matrix, range(block.inner, block.inner))
            first, stop = min(known.start, block.inner), max(known.stop, self._inner(block).stop)
            self._inner_of[block.matrix] = range(first, stop)
        self._sketch = self._squares = self._ratios = torch.empty(0)

    def _first_state(self, number: int) -> State:
        shape = self.plan.rows_of_flat[number], self.group["rank"]
        matrices = self.plan.flat_of_matrix.count(number)
        return {
            "exp_avg": torch.zeros(shape, device=self.device),
            "exp_avg_sq": torch.zeros(shape, device=self.device),
            "limiter": torch.zeros(matrices, device=self.device),
            "calls": 0,
        }

    def begin(self, group: Group, states: list[State]) -> None:
        super().begin(group, states)
        for rows, state in zip(self.plan.rows_of_flat, states, strict=True):
            found, expected = tuple(state["exp_avg"].shape), (rows, group["rank"])
            if found != expected:
                raise ValueError(
                    f"state of {self.plan.matrices[0].name!r} and what is stepped with it: found "
                    f"the shape {found}, expected {expected}: it was saved with another `rank`, or "
                    "on another number of ranks or ZeRO stage"
                )

    def square_sum(self) -> Tensor:
        return self._squares.sum(dtype=torch.float64)

    def project(self) -> Tensor:
        plan, rank = self.plan, self.group["rank"]
        self._sketch = torch.zeros(plan.slots, rank, device=self.device)
        self._squares = torch.zeros(plan.slots, device=self.device)
        for number, blocks in groupby(plan.blocks, key=lambda block: block.matrix):
            needed, calls = (
                self._inner_of[number],
                self.states[plan.flat_of_matrix[number]]["calls"],
            )
            projection = self._kept.get(
                plan.matrices[number], needed, calls, self.group, self.device
            )
            for block in blocks:
                channels, inner = self._channels(self.gradients, block), self._inner(block)
                slots = slice(block.slot, block.slot + len(channels))
                rows = projection[inner.start - needed.start : inner.stop - needed.start]
                self._sketch[slots].addmm_(channels, rows)
                self._squares[slots] += channels.square().sum(1)
        shared = [self._sketch[plan.rows_here :], self._squares[plan.rows_here :, None]]
        return torch.cat(shared, dim=1).view(plan.world, plan.chunk * (rank + 1))

    def adapt(self, received: Tensor, well: Tensor) -> Tensor:
        plan, group, rank = self.plan, self.group, self.group["rank"]
        dealt = received.view(plan.chunk, rank + 1)
        self._sketch[plan.rows_here : plan.rows] = dealt[:, :rank]
        self._squares[plan.rows_here : plan.rows] = dealt[:, rank]
        sketch = torch.where(well, self._sketch[: plan.rows], 0.0)
        squares = self._squares[: plan.rows].double()
        adapted = self._adam(sketch, well)
        norms, adapted_norms = (
            torch.linalg.vector_norm(x, dim=1).double() for x in (sketch, adapted)
        )
        self._ratios = torch.ones_like(norms)
        if group["scale_type"] == "channel":
            self._ratios = adapted_norms / (norms + 1e-8)
        of_channel = torch.stack([self._ratios**2 * squares, norms**2, adapted_norms**2], dim=1)
        sums = torch.segment_reduce(of_channel, "sum", lengths=self._channels_of, axis=0, initial=0)
        sums = sums.view(2, -1, 3).sum(0)[:-1]
        return torch.cat([self._ratios[plan.rows_here :], sums.flatten()])

    def apply(self, told: Tensor, well: Tensor) -> None:
        plan, group = self.plan, self.group
        told = told.to(self.device)
        ratios = torch.cat([self._ratios[: plan.rows_here], told[:, : plan.chunk].flatten()])
        squares, norms, adapted = told[:, plan.chunk :].sum(0).view(-1, 3).unbind(1)  # (n,) each
        scale = torch.ones_like(squares)
        if group["scale_type"] == "tensor":
            scale = adapted.sqrt() / (norms.sqrt() + 1e-8)
        alpha = math.sqrt(group["scale"])
        limit = self._limit(scale * squares.sqrt() * (alpha if group["scale_front"] else 1), well)
        decay = torch.where(well, group["lr"] * group["weight_decay"], 0.0)
        rate = group["lr"] * alpha * self._corrections() * scale / limit * (1 - decay)
        rate = torch.cat([rate, rate.new_zeros(1)])[self._matrix_of_slot]
        step = torch.where(well, ratios * rate, 0.0).float()
        for block in plan.blocks:
            weight = self._channels(self.weights, block)
            gradient = torch.where(well, self._channels(self.gradients, block), 0.0)
            if group["weight_decay"]:  # not w *= 1 - decay, whose rounding goes one way each step
                weight.addcmul_(weight, decay, value=-1)
            step_of = step[block.slot : block.slot + len(weight), None]
            weight.addcmul_(gradient, step_of, value=-1)
        self.end()

    def end(self) -> None:
        super().end()
        self._sketch = self._squares = self._ratios = torch.empty(0)

    def _adam(self, sketch: Tensor, well: Tensor) -> Tensor:
        """M and V brought up to date, if all is well, and N = M / (sqrt(V) + eps): (c, r)."""
        moments = [state["exp_avg"] for state in self.states]
        squares = [state["exp_avg_sq"] for state in self.states]
        rows = self.plan.rows_of_flat
        for kept, new, beta in zip(
            (moments, squares), (sketch, sketch.square()), self.group["betas"], strict=True
        ):
            # Unless all is well, this multiplies by 1 and adds 0.
            foreach._foreach_mul_(kept, torch.where(well, beta, 1.0))
            foreach._foreach_add_(kept, list((new * (1 - beta)).split(rows)))
        for state in self.states:
            state["step"] += well
            state["calls"] += 1
        adapted = torch.empty_like(sketch)
        foreach._foreach_copy_(list(adapted.split(rows)), squares)
        adapted.sqrt_().add_(self.group["eps"]).reciprocal_()
        foreach._foreach_mul_(list(adapted.split(rows)), moments)
        return adapted

    def _corrections(self) -> Tensor:
        """sqrt(1 - b2^t) / (1 - b1^t) for every matrix, where t is the steps that counted: (n,)."""
        steps = torch.stack([state["step"] for state in self.states]).double()
        beta1, beta2 = self.group["betas"]
        return ((1 - beta2**steps).sqrt() / (1 - beta1**steps))[self._flat_of_matrix]

    def _limit(self, norms: Tensor, well: Tensor) -> Tensor:
        """L for every matrix, from the norms of U: (n,). The first norm above 0 starts the limiter:
        one that had started at 0 would let nothing pass, ever."""
        gamma = self.group["gamma"]
        if gamma is None:
            return torch.ones_like(norms)
        limiters = [state["limiter"] for state in self.states]
        last = torch.cat(limiters)
        growth = (norms / (last + 1e-8)).clamp(min=gamma) / gamma
        limit = torch.where(last > 0, growth, 1.0)
        last = torch.where(well & (norms > 0), norms / limit, last).float()
        foreach._foreach_copy_(limiters, list(last.split([len(one) for one in limiters])))
        return limit

    def _channels(self, flats: Sequence[Tensor], block: Block) -> Tensor:
        """A block of some flats as (channels, inner): a view."""
        stretch = flats[block.flat].view(-1)[
            block.offset : block.offset + block.height * block.width
        ]
        rectangle = stretch.view(block.height, block.width)
        return rectangle if self.plan.matrices[block.matrix].by_rows else rectangle.T

    def _inner(self, block: Block) -> range:
        by_rows = self.plan.matrices[block.matrix].by_rows
        return range(block.inner, block.inner + (block.width if by_rows else block.height))


class Projections:
    """The matrices P of an optimizer: made from their address, and kept until their refresh as long
    as there is room."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[int, Tensor]] = {}

    def get(
        self, matrix: Matrix, inner: range, calls: int, group: Group, device: torch.device
    ) -> Tensor:
        """The rows of P for some inner indices of a matrix, entries from N(0, 1/r), or of that
        variance: fp32 (inner, r). `calls`: steps before this one."""
        rank, refresh = group["rank"], calls // group["update_proj_gap"]
        address = matrix.name, inner, rank
        made_at, projection = self._kept.pop(address, (None, None))
        if projection is None or made_at != refresh:
            make, key = PROJECTIONS[group["projection"]], key_of(group["seed"], matrix.name)
            projection = make(inner, range(rank), refresh, key, device).div_(math.sqrt(rank))
        if projection.nbytes + sum(kept.nbytes for _, kept in self._kept.values()) <= KEPT_BYTES:
            self._kept[address] = refresh, projection
        return projection


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
